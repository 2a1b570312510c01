// The KV cache as a map: a cell for each block (or for a few, in a large pool), in the colour of its request.

import { color, themeColor } from "./colors.js";

const GAP = 1.5;
const DIMMED = 0.18;

export class BlockMap {
  /** `onHover(text | null)` is told what the pointer is on; `onChoose(handle)` which request was clicked. */
  constructor(canvas, describe, onChoose) {
    this.canvas = canvas;
    this.describe = describe;
    this.cells = [];
    canvas.addEventListener("pointermove", (event) => (canvas.title = this.describe(this.cellAt(event), this.map)));
    canvas.addEventListener("click", (event) => {
      const cell = this.cellAt(event);
      if (cell?.owner > 0) onChoose(cell.owner);
    });
  }

  /** Draws `map` (minivllm/engine_view.py BlockMap); `chosen`: a request whose blocks stand out, if any. */
  draw(map, chosen) {
    this.map = map;
    this.cells = expand(map);
    const isChosen = chosen ? chooser(chosen, map) : () => true;
    const width = this.canvas.clientWidth;
    this.size = Math.max(4, Math.min(15, Math.floor(Math.sqrt((width * 190) / this.cells.length))));
    this.columns = Math.max(1, Math.floor(width / this.size));
    const height = Math.ceil(this.cells.length / this.columns) * this.size;
    const context = prepare(this.canvas, width, height);
    const [free, cached, ink] = [themeColor("--free"), themeColor("--cached"), themeColor("--ink")];
    this.cells.forEach((cell, index) => {
      const [x, y] = [(index % this.columns) * this.size, Math.floor(index / this.columns) * this.size];
      const side = this.size - GAP;
      context.globalAlpha = isChosen(cell) ? 1 : DIMMED;
      context.fillStyle = cell.owner > 0 ? color(cell.owner) : cell.owner < 0 ? cached : free;
      context.fillRect(x, y, side, side);
      if (cell.references > 1) {
        context.strokeStyle = ink;
        context.lineWidth = Math.max(1, this.size / 6);
        context.strokeRect(x + context.lineWidth / 2, y + context.lineWidth / 2, side - context.lineWidth, side - context.lineWidth);
      }
    });
    context.globalAlpha = 1;
    this.canvas.setAttribute(
      "aria-label",
      `Map of ${map.num_blocks} KV cache blocks: ${map.used} used, ${map.cached} cached, ${map.free} free`,
    );
  }

  cellAt(event) {
    if (!this.size) return undefined;
    const index = Math.floor(event.offsetY / this.size) * this.columns + Math.floor(event.offsetX / this.size);
    return event.offsetX < this.columns * this.size ? this.cells[index] : undefined;
  }
}

/** Which cells hold blocks of a request. A shared block has the colour of its first request: `runs` tell of the others. */
function chooser({ handle, runs }, map) {
  const shared = new Set();
  for (const [first, count] of runs) {
    for (let block = first; block < first + count; block++) shared.add(block - (block % map.blocks_per_cell));
  }
  return (cell) => cell.owner === handle || (cell.references > 1 && shared.has(cell.block));
}

function expand(map) {
  const cells = [];
  map.lengths.forEach((length, run) => {
    for (let index = 0; index < length; index++) {
      cells.push({ block: cells.length * map.blocks_per_cell, owner: map.owners[run], references: map.references[run] });
    }
  });
  return cells;
}

/** Sizes a canvas for the screen's pixels; its context, scaled so that one unit is one CSS pixel. */
export function prepare(canvas, width, height) {
  const scale = devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}
