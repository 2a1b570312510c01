// Puts the page together: reads the engine's events, keeps the history, and draws what is to be seen.

import { BlockMap } from "./blocks.js";
import { Chat } from "./chat.js";
import { isDark } from "./colors.js";
import { Detail } from "./detail.js";
import { History, shortName } from "./history.js";
import { drawFigures, drawStages, RequestTable } from "./panels.js";
import { events } from "./sse.js";
import { Timeline } from "./timeline.js";

const RETRY_MS = 1500;
const $ = (id) => document.getElementById(id);

const history = new History();
let frozen = null; // while paused: the passes to step through, and the index of the one that is shown
let drawing = false;

const choose = (handle) => {
  const id = (frozen?.steps[frozen.index]?.state.requests.get(handle) ?? history.requests.get(handle))?.request_id;
  if (id) detail.show(id);
};
const detail = new Detail(scheduleDraw);
const chat = new Chat((requestId) => history.handleOf(requestId));
const table = new RequestTable(choose);
const timeline = new Timeline($("timeline"), (step) => {
  if (!frozen) pause();
  show(frozen.steps.indexOf(step));
});
const blockMap = new BlockMap($("blocks"), describeCell, choose);

function describeCell(cell, map) {
  if (!cell) return "";
  const where = map.blocks_per_cell === 1 ? `Block ${cell.block}` : `Blocks ${cell.block} to ${cell.block + map.blocks_per_cell - 1}`;
  if (cell.owner === 0) return `${where}: free`;
  if (cell.owner < 0) return `${where}: cached. No request refers to it; a prompt that begins alike finds it again. (engine_core/block_pool.py)`;
  const shared = cell.references > 1 ? `, shared by ${cell.references} requests: their prompts begin alike` : "";
  return `${where}: ${history.name(cell.owner)}${shared}. (engine_core/kv_cache_manager.py)`;
}

/** At most once per frame, however much has arrived. */
function scheduleDraw() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    draw();
  });
}

function draw() {
  const steps = frozen?.steps ?? history.steps;
  const step = frozen ? steps[frozen.index] : steps.at(-1);
  const state = frozen && step ? step.state : { view: history.view, blocks: history.blocks, requests: history.requests };
  if (!state.view) return;
  const now = frozen ? step.collected : state.view.time;
  drawFigures(state.view, state.blocks, frozen && step, history.rate(now));
  drawStages(state, step, !frozen, choose);
  timeline.draw(steps, frozen ? Math.min(steps.at(-1).collected, now + 1.5) : now, frozen && step);
  const chosen = detail.requestId && { handle: history.handleOf(detail.requestId), runs: detail.runs };
  if (state.blocks) blockMap.draw(state.blocks, chosen);
  $("blocks-chosen").textContent = chosen ? describeHolding(chosen.runs) : "";
  table.draw(frozen ? state.requests : history.requests, chosen?.handle);
  chat.recolor();
}

function describeHolding(runs) {
  const count = runs.reduce((sum, [, length]) => sum + length, 0);
  return `${shortName(detail.requestId)} holds ${count} block${count === 1 ? "" : "s"}`;
}

function pause() {
  if (!history.steps.length) return;
  frozen = { steps: history.steps.slice(), index: history.steps.length - 1 };
  $("pause").setAttribute("aria-pressed", "true");
  $("pause").textContent = "Go on";
  show(frozen.index);
}

function goOn() {
  frozen = null;
  $("pause").setAttribute("aria-pressed", "false");
  $("pause").textContent = "Pause";
  $("back").disabled = $("forward").disabled = true;
  $("moment").textContent = "live";
  scheduleDraw();
}

/** Shows pass `index` of the frozen ones. */
function show(index) {
  if (!frozen) return;
  frozen.index = Math.max(0, Math.min(frozen.steps.length - 1, index));
  $("back").disabled = frozen.index === 0;
  $("forward").disabled = frozen.index === frozen.steps.length - 1;
  $("moment").textContent = `pass ${frozen.steps[frozen.index].number}`;
  scheduleDraw();
}

$("pause").addEventListener("click", () => (frozen ? goOn() : pause()));
$("back").addEventListener("click", () => show(frozen.index - 1));
$("forward").addEventListener("click", () => show(frozen.index + 1));
document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, textarea, select, button, dialog, .text") || event.ctrlKey || event.metaKey || event.altKey) return;
  const action = { " ": () => (frozen ? goOn() : pause()), ArrowLeft: () => (frozen ? show(frozen.index - 1) : pause()), ArrowRight: () => frozen && show(frozen.index + 1) }[event.key];
  if (action) {
    event.preventDefault();
    action();
  }
});
$("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  localStorage.setItem("minivllm-theme", document.documentElement.dataset.theme);
  scheduleDraw();
});
const theme = localStorage.getItem("minivllm-theme");
if (theme) document.documentElement.dataset.theme = theme;
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", scheduleDraw);
addEventListener("resize", scheduleDraw);

function say(text, isBad) {
  $("engine").textContent = text;
  $("engine").classList.toggle("bad", isBad);
}

function onEvent(event) {
  if (event.type === "engine") {
    const facts = event.facts;
    const model = event.model_name.split("/").pop();
    if (facts) say(`${model} · ${facts.device}, ${facts.dtype} · context ${facts.max_model_len} · ${facts.num_blocks} KV blocks of ${facts.block_size} tokens`, false);
    else say("the engine core is not ready", true);
  } else {
    history.add(event);
    if (!frozen) scheduleDraw();
  }
}

for (;;) {
  try {
    for await (const event of events("/v1/engine/events")) onEvent(event);
    say("the server closed the connection; trying again", true);
  } catch (error) {
    say(`no connection (${error.message}); trying again`, true);
  }
  await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
}
