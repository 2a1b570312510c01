// The chat: one question, up to three answers that stream side by side over POST /generate.

import { events } from "./sse.js";
import { color } from "./colors.js";

const $ = (id) => document.getElementById(id);

/** `handleOf(requestId)`: the number that the engine knows a request by, once it was seen. */
export class Chat {
  constructor(handleOf) {
    this.handleOf = handleOf;
    this.abort = null;
    this.panes = [];
    $("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    $("question").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        $("ask").requestSubmit();
      }
    });
    $("stop").addEventListener("click", () => this.abort?.abort());
    $("panes").addEventListener("change", () => this.abort || this.showPanes());
    this.showPanes();
  }

  showPanes() {
    const letters = ["A", "B", "C"].slice(0, Number($("panes").value));
    this.panes = letters.map((letter) => new Pane(letter));
    $("answers").replaceChildren(...this.panes.map((pane) => pane.element));
  }

  async send() {
    const question = $("question").value.trim();
    if (!question || this.abort || !$("ask").reportValidity()) return;
    this.showPanes();
    this.abort = new AbortController();
    $("send").disabled = true;
    $("stop").disabled = false;
    const run = crypto.getRandomValues(new Uint32Array(1))[0].toString(16).padStart(8, "0").slice(0, 4);
    await Promise.all(this.panes.map((pane, index) => pane.stream(body(question, index, run, pane), this.abort.signal)));
    this.abort = null;
    $("send").disabled = false;
    $("stop").disabled = true;
  }

  /** Gives panes the colours of their requests. */
  recolor() {
    for (const pane of this.panes) {
      const handle = this.handleOf(pane.requestId);
      if (handle) pane.element.style.setProperty("--color", color(handle));
    }
  }
}

function body(question, index, run, pane) {
  pane.requestId = `${pane.letter}-${run}`;
  const fields = {
    messages: [{ role: "user", content: question }],
    temperature: Number($("temperature").value),
    max_tokens: Number($("max-tokens").value),
    request_id: pane.requestId,
  };
  // With a seed the answers can be had again; each pane takes the next one, else all would be the same.
  if ($("seed").value !== "") fields.seed = Number($("seed").value) + index;
  return fields;
}

class Pane {
  constructor(letter) {
    this.letter = letter;
    this.requestId = "";
    this.element = document.createElement("article");
    this.element.className = "answer";
    this.element.setAttribute("aria-label", `Answer ${letter}`);
    const title = document.createElement("h3");
    this.note = document.createElement("span");
    title.append(letter, this.note);
    this.text = document.createElement("div");
    this.text.className = "text";
    this.text.setAttribute("aria-live", "polite");
    this.text.tabIndex = 0;
    this.text.setAttribute("role", "log");
    this.text.setAttribute("aria-label", `Text of answer ${letter}`);
    this.element.append(title, this.text);
  }

  async stream(fields, signal) {
    const start = performance.now();
    let numTokens = 0;
    let firstToken = "";
    this.element.classList.add("streams");
    this.note.textContent = "waiting …";
    try {
      const options = { method: "POST", headers: { "content-type": "application/json" }, signal, body: JSON.stringify(fields) };
      for await (const event of events("/generate", options)) {
        if (event.error) throw new Error(event.error.message);
        firstToken ||= `first after ${Math.round(performance.now() - start)} ms`;
        numTokens += event.token_ids.length;
        this.append(event.text);
        this.note.textContent = `${numTokens} tokens · ${event.finish_reason ?? firstToken}`;
      }
    } catch (error) {
      if (error.name === "AbortError") {
        this.note.textContent = `${numTokens} tokens · stopped`;
      } else {
        this.note.textContent = "failed";
        this.text.classList.add("bad");
        this.append(error.message);
      }
    } finally {
      this.element.classList.remove("streams");
    }
  }

  append(text) {
    const atEnd = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 30;
    this.text.append(text);
    if (atEnd) this.text.scrollTop = this.text.scrollHeight;
  }
}
