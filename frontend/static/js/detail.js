// One request's own story, from GET /v1/requests/{id}: what happened, why it waited, and which blocks it holds.

import { element, milliseconds } from "./panels.js";
import { request } from "./sse.js";

const REFRESH_MS = 1000;
const $ = (id) => document.getElementById(id);
const REASONS = {
  turn: "for a pass of the other kind to end",
  rows: "for a row (as many requests ran as --max-num-seqs allows)",
  blocks: "for KV cache blocks",
  budget: "for room in a prefill pass (--max-num-batched-tokens)",
};

/** The chosen request: beside the page, so that its blocks can be seen meanwhile. */
export class Detail {
  /** `onChange()`: another request is chosen, or none, or its blocks are other ones. */
  constructor(onChange) {
    this.onChange = onChange;
    this.requestId = null;
    this.runs = []; // its blocks, [first, count] each
    $("detail").addEventListener("close", () => this.choose(null));
    document.addEventListener("keydown", (event) => event.key === "Escape" && !$("login").open && $("detail").close());
  }

  show(requestId) {
    $("detail-title").textContent = requestId;
    $("detail-why").textContent = "…";
    $("detail-bar").replaceChildren();
    $("detail-events").replaceChildren();
    if (!$("detail").open) $("detail").show();
    this.choose(requestId);
    this.follow(requestId);
  }

  choose(requestId) {
    this.requestId = requestId;
    this.runs = [];
    this.onChange();
  }

  /** Asks again and again until the request ends or another one is chosen. */
  async follow(requestId) {
    try {
      for (;;) {
        const timeline = await (await request(`/v1/requests/${encodeURIComponent(requestId)}`)).json();
        if (this.requestId !== requestId) return;
        draw(timeline);
        this.runs = timeline.block_runs;
        this.onChange();
        if (timeline.finished_at !== null) return;
        await new Promise((resolve) => setTimeout(resolve, REFRESH_MS));
      }
    } catch (error) {
      if (this.requestId === requestId) $("detail-why").textContent = error.message;
    }
  }
}

function draw(timeline) {
  $("detail-why").textContent = why(timeline);
  const stages = stagesOf(timeline);
  const end = timeline.finished_at ?? timeline.age;
  $("detail-bar").setAttribute("aria-label", stages.map((stage) => `${stage.name} ${milliseconds(stage.seconds)}`).join(", "));
  $("detail-bar").replaceChildren(
    ...stages.map((stage) => {
      const part = element("i", { className: stage.className, title: `${stage.name}: ${milliseconds(stage.seconds)}` });
      part.style.width = `${(100 * stage.seconds) / end}%`;
      return part;
    }),
  );
  $("detail-events").replaceChildren(
    ...eventsOf(timeline).map(([at, text]) => element("li", {}, element("time", { textContent: milliseconds(at) }), element("span", { textContent: text }))),
  );
}

function why(timeline) {
  const waits = Object.entries(timeline.waited).filter(([, seconds]) => seconds >= 0.0005);
  const parts = waits.map(([reason, seconds]) => `${milliseconds(seconds)} ${REASONS[reason]}`);
  const past = parts.length ? `It waited ${parts.join(", ")}.` : "It did not have to wait.";
  const ahead = timeline.num_ahead === null ? "" : ` It waits now, with ${timeline.num_ahead} requests before it.`;
  const cached = timeline.num_cached_tokens ? ` ${timeline.num_cached_tokens} of its ${timeline.num_prompt_tokens} prompt tokens were in the prefix cache.` : "";
  return past + ahead + cached;
}

function stagesOf(timeline) {
  const end = timeline.finished_at ?? timeline.age;
  const scheduled = timeline.scheduled_at ?? end;
  const first = timeline.first_token_at ?? end;
  const preempted = timeline.preemptions.reduce((sum, one) => sum + (one.resumed_at ?? end) - one.at, 0);
  return [
    { name: "queued", className: "queued", seconds: scheduled },
    { name: "prefill", className: "prefilling", seconds: first - scheduled },
    { name: "preempted", className: "preempted", seconds: preempted },
    { name: "decode", className: "decoding", seconds: Math.max(0, end - first - preempted) },
  ];
}

function eventsOf(timeline) {
  const events = [[0, `arrives with ${timeline.num_prompt_tokens} prompt tokens`]];
  if (timeline.scheduled_at !== null) events.push([timeline.scheduled_at, "gets a row and blocks"]);
  for (const chunk of timeline.prefill_chunks) {
    const took = chunk.end === null ? "" : ` in ${milliseconds(chunk.end - chunk.at)}`;
    events.push([chunk.at, `prefill: tokens ${chunk.start} to ${chunk.start + chunk.count - 1}${took}`]);
  }
  if (timeline.num_prefill_chunks > timeline.prefill_chunks.length) events.push([timeline.age, `${timeline.num_prefill_chunks} prefill chunks in all`]);
  if (timeline.first_token_at !== null) events.push([timeline.first_token_at, "first token"]);
  for (const preemption of timeline.preemptions) {
    events.push([preemption.at, "preempted: its blocks go to older requests"]);
    if (preemption.resumed_at !== null) events.push([preemption.resumed_at, `resumed: ${preemption.num_tokens} tokens are computed again`]);
  }
  const tokens = `${timeline.num_output_tokens} tokens, ${timeline.num_decode_steps} decode passes`;
  if (timeline.finished_at !== null) events.push([timeline.finished_at, `ends: ${timeline.finish_reason}, ${tokens}`]);
  else if (timeline.first_token_at !== null) events.push([timeline.age, `decoding: ${tokens} so far`]);
  return events.sort((a, b) => a[0] - b[0]);
}
