// What the page knows: the passes of the last minutes, the requests, and how things stood after each pass.

const MAX_STEPS = 3000;
const MAX_REQUESTS = 200;
const RATE_SECONDS = 2;

export class History {
  constructor() {
    this.reset(null);
  }

  reset(epoch) {
    this.epoch = epoch;
    this.steps = []; // as in minivllm/engine_view.py StepRecord, each with `view`: how things stood right after it
    this.requests = new Map(); // handle → RequestRow
    this.view = null; // the latest
    this.blocks = null; // the latest map that came
    this.lastDecode = [];
  }

  /** Takes in one view. A new life of the engine core begins a new history. */
  add(view) {
    if (view.epoch !== this.epoch) this.reset(view.epoch);
    this.blocks = view.blocks ?? this.blocks;
    this.view = view;
    for (const row of view.requests) this.requests.set(row.handle, row);
    const state = { view, blocks: this.blocks, requests: new Map(view.requests.map((row) => [row.handle, row])) };
    for (const step of view.steps) {
      step.requests ??= this.lastDecode;
      if (step.kind === "decode") this.lastDecode = step.requests;
      step.state = state;
      this.steps.push(step);
    }
    this.steps.splice(0, this.steps.length - MAX_STEPS);
    this.forgetRequests();
  }

  forgetRequests() {
    for (const [handle, row] of this.requests) {
      if (this.requests.size <= MAX_REQUESTS) return;
      if (row.status === "finished") this.requests.delete(handle);
    }
  }

  /** Tokens generated per second in the seconds before `time`. */
  rate(time) {
    let tokens = 0;
    for (let index = this.steps.length - 1; index >= 0; index--) {
      const step = this.steps[index];
      if (step.collected > time) continue;
      if (step.collected < time - RATE_SECONDS) break;
      tokens += step.kind === "decode" ? step.requests.length : step.sampled.length;
    }
    return tokens / RATE_SECONDS;
  }

  /** The youngest request of that id; null: none is known. */
  handleOf(requestId) {
    let found = null;
    for (const row of this.requests.values()) if (row.request_id === requestId) found = row.handle;
    return found;
  }

  name(handle) {
    return shortName(this.requests.get(handle)?.request_id ?? `#${handle}`);
  }
}

/** `gen-0123456789abcdef…` → `gen-0123`: enough to tell requests apart. */
export function shortName(id) {
  return id.length > 14 ? id.slice(0, 8) : id;
}
