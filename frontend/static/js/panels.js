// The texts beside the pictures: figures, the two stages, the table of requests.

import { color } from "./colors.js";
import { shortName } from "./history.js";

const MAX_CHIPS = 300; // of a list
const $ = (id) => document.getElementById(id);
const WAITING_FOR = {
  turn: "The first of them waits for its turn: a pass of the other kind runs.",
  rows: "The first of them waits for a row: as many requests run as --max-num-seqs allows.",
  blocks: "The first of them waits for KV blocks: not enough are unused.",
  budget: "The first of them waits for the next pass: this one is full (--max-num-batched-tokens).",
};

export function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

/** Figures of one moment. `step` is the pass that is shown, if any. */
export function drawFigures(view, blocks, step, rate) {
  $("rate").textContent = rate >= 100 ? Math.round(rate) : rate.toFixed(1);
  $("running").textContent = view.num_running;
  $("waiting").textContent = view.num_waiting;
  $("preemptions").textContent = view.num_preemptions;
  if (!blocks) return;
  const used = step ? step.blocks_used : blocks.used;
  $("usage").textContent = `${((100 * used) / blocks.num_blocks).toFixed(used / blocks.num_blocks < 0.1 ? 1 : 0)} %`;
  $("blocks-numbers").textContent = `${blocks.used} used · ${blocks.cached} cached · ${blocks.free} free`;
  const each = blocks.blocks_per_cell === 1 ? "Each cell is a block" : `Each cell is ${blocks.blocks_per_cell} blocks`;
  $("blocks-caption").textContent = `${each}: the keys and values of ${view.block_size} tokens of a request. Requests whose prompts begin alike share blocks.`;
}

/** The prefill queue and the batch of the pass `step`. */
export function drawStages(state, step, isLive, onChoose) {
  const queue = [...state.requests.values()].filter((row) => row.status === "waiting" || row.status === "prefill");
  const waiting = queue.sort((a, b) => a.handle - b.handle).map((row) => ({
    handle: row.handle,
    textContent: `${shortName(row.request_id)} ${row.num_computed_tokens}/${row.num_tokens}`,
    title: describeQueued(row, step),
    className: "chip",
  }));
  fill($("queue"), waiting, "Empty.", onChoose);
  const idle = isLive && state.view.num_running === 0 && state.view.num_waiting === 0;
  const kind = $("pass-kind");
  kind.textContent = idle || !step ? "last" : step.kind;
  kind.className = `kind ${idle || !step ? "" : step.kind}`;
  $("pass-caption").textContent = passCaption(step, state);
  const served = (step?.requests ?? []).map((handle, index) => {
    const row = state.requests.get(handle);
    const end = step.kind === "prefill" ? step.starts[index] + step.counts[index] : 0;
    const name = row ? shortName(row.request_id) : `#${handle}`;
    return {
      handle,
      textContent: step.kind === "prefill" ? `${name} [${step.starts[index]}:${end}]` : name,
      title: step.kind === "prefill" ? "Prompt tokens computed in this pass" : "One token in this pass",
      className: idle ? "chip old" : "chip",
    };
  });
  fill($("batch"), served, "No pass yet.", onChoose);
}

function passCaption(step, state) {
  if (!step) return "One forward pass of the model at a time, of one kind.";
  const ms = (1000 * (step.collected - step.began)).toFixed(0);
  const preempted = step.preempted.length ? ` Preempted ${step.preempted.length}.` : "";
  const waits = step.waiting_for && step.prefill_queue > 0 && state.view.num_waiting > 0 ? ` ${WAITING_FOR[step.waiting_for]}` : "";
  if (step.kind === "prefill") return `${step.num_tokens} prompt tokens share one pass over all weights: ${ms} ms.${preempted}${waits}`;
  return `All weights are read once for ${step.requests.length} token${step.requests.length === 1 ? "" : "s"}, one per request: ${ms} ms.${preempted}${waits}`;
}

function describeQueued(row, step) {
  if (row.status === "prefill") return "Partly computed; its next chunk comes in the next prefill pass. (engine_core/kv_cache_manager.py, allocate_prefill)";
  const preempted = row.num_preemptions ? "Preempted: its blocks went to older requests, it is computed again. " : "";
  return preempted + (WAITING_FOR[step?.waiting_for] ?? "Waits.");
}

/** Shows chips {handle, textContent, title, className} in `list`. They are kept, so that clicks and the focus are, too. */
function fill(list, chips, none, onChoose) {
  const shown = chips.slice(0, MAX_CHIPS);
  const handles = new Set(shown.map((chip) => String(chip.handle)));
  for (const item of [...list.children]) if (!handles.has(item.dataset.handle)) item.remove();
  const kept = new Map([...list.children].map((item) => [item.dataset.handle, item]));
  shown.forEach(({ handle, ...properties }, index) => {
    const item = kept.get(String(handle)) ?? makeChip(handle, onChoose);
    if (item.firstChild.textContent === properties.textContent) delete properties.textContent;
    Object.assign(item.firstChild, properties).style.setProperty("--color", color(handle));
    if (list.children[index] !== item) list.insertBefore(item, list.children[index] ?? null);
  });
  if (!shown.length) list.append(element("li", { className: "none", textContent: none }));
}

function makeChip(handle, onChoose) {
  const button = element("button", { type: "button" });
  button.addEventListener("click", () => onChoose(handle));
  const item = element("li", {}, button);
  item.dataset.handle = handle;
  return item;
}

/** The table, youngest first. Rows are kept, so that the focus stays where it is. */
export class RequestTable {
  constructor(onChoose) {
    this.onChoose = onChoose;
    this.rows = new Map();
  }

  draw(requests, chosen) {
    const shown = [...requests.values()].sort((a, b) => b.handle - a.handle).slice(0, 60);
    const handles = new Set(shown.map((row) => row.handle));
    for (const [handle, row] of this.rows) {
      if (!handles.has(handle)) {
        row.remove();
        this.rows.delete(handle);
      }
    }
    let next = null;
    for (const row of shown.reverse()) {
      const line = this.rows.get(row.handle) ?? this.make(row);
      this.update(line, row);
      line.classList.toggle("chosen", row.handle === chosen);
      if (line.nextSibling !== next || !line.parentNode) $("requests").insertBefore(line, next);
      next = line;
    }
    $("no-requests").hidden = shown.length > 0;
  }

  make(row) {
    const button = element("button", { type: "button", textContent: shortName(row.request_id), title: `${row.request_id}: where did its time go?` });
    button.addEventListener("click", () => this.onChoose(row.handle));
    const line = element("tr", {}, element("td", {}, button), element("td"), element("td", { className: "n" }), element("td", { className: "n" }), element("td"));
    this.rows.set(row.handle, line);
    return line;
  }

  update(line, row) {
    const [name, state, tokens, cached, first] = line.children;
    name.firstChild.style.setProperty("--color", color(row.handle));
    line.className = row.status;
    state.textContent = (row.finish_reason ?? row.status) + (row.num_preemptions ? ` ↩${row.num_preemptions}` : "");
    tokens.textContent = `${row.num_prompt_tokens} + ${row.num_tokens - row.num_prompt_tokens}`;
    cached.textContent = row.num_cached_tokens || "–";
    if (row.first_token_time && !first.firstChild) first.replaceChildren(...split(row));
  }
}

/** TTFT: waiting, then prefill passes, then the pass that brought the first token. */
function split(row) {
  const parts = [
    ["queued", row.first_scheduled_time - row.arrival_time, "queued"],
    ["prefilling", row.last_chunk_time - row.first_scheduled_time, "earlier prefill chunks"],
    ["first", row.first_token_time - row.last_chunk_time, "the pass that brought it"],
  ];
  const total = row.first_token_time - row.arrival_time;
  const bar = element("span", { className: "split" });
  bar.title = parts.map(([, seconds, text]) => `${text} ${milliseconds(seconds)}`).join(", ");
  for (const [className, seconds] of parts) {
    const part = element("i", { className });
    part.style.width = `${(100 * seconds) / total}%`;
    bar.append(part);
  }
  return [bar, milliseconds(total)];
}

export function milliseconds(seconds) {
  return seconds < 10 ? `${Math.round(1000 * seconds)} ms` : `${seconds.toFixed(1)} s`;
}
