// Passes over time, in two lanes. The window ends at the last pass (or, while paused, a little after the chosen one).

import { prepare } from "./blocks.js";
import { color, themeColor } from "./colors.js";

const SECONDS = 6;
const LANE = 34;
const HEIGHT = 92;
const LEFT = 58;

export class Timeline {
  /** `onChoose(step)`: a pass was clicked. */
  constructor(canvas, onChoose) {
    this.canvas = canvas;
    canvas.addEventListener("click", (event) => {
      const step = this.stepAt(event.offsetX);
      if (step) onChoose(step);
    });
    canvas.addEventListener("pointermove", (event) => {
      const step = this.stepAt(event.offsetX);
      canvas.title = step ? describe(step) : "";
    });
  }

  /** `end`: the time at its right edge, in seconds of the engine's clock; `chosen`: a pass to mark. */
  draw(steps, end, chosen) {
    const width = this.canvas.clientWidth;
    const context = prepare(this.canvas, width, HEIGHT);
    const x = (time) => LEFT + ((time - end + SECONDS) / SECONDS) * (width - LEFT);
    this.shown = [];
    const [ink, soft, line, prefill] = ["--ink", "--soft", "--line", "--prefill"].map(themeColor);
    context.font = "12px system-ui, sans-serif";
    context.fillStyle = soft;
    context.fillText("prefill", 0, 8 + LANE / 2);
    context.fillText("decode", 0, 14 + LANE * 1.5);
    context.fillStyle = line;
    context.fillRect(LEFT, 4 + LANE, width - LEFT, 1);
    context.fillRect(LEFT, 10 + 2 * LANE, width - LEFT, 1);
    for (let second = Math.ceil(end - SECONDS); second <= end; second++) context.fillRect(x(second), 4, 1, 6 + 2 * LANE);
    const visible = steps.filter((step) => step.collected > end - SECONDS && step.began < end);
    const largest = Math.max(4, ...visible.map((step) => (step.kind === "decode" ? step.requests.length : 0)));
    for (const step of visible) {
      const [left, right] = [Math.max(LEFT, x(step.began)), Math.max(x(step.began) + 1.5, x(step.collected) - 0.6)];
      this.shown.push({ left, right, step });
      if (step.kind === "prefill") {
        context.fillStyle = prefill;
        context.fillRect(left, 4, right - left, LANE);
      } else {
        stack(context, left, right - left, step.requests, largest);
      }
      if (step.preempted.length) {
        context.fillStyle = ink;
        context.fillText("↩", left, 10 + 2 * LANE + 11);
      }
      if (step === chosen) {
        context.strokeStyle = ink;
        context.lineWidth = 2;
        context.strokeRect(left - 1, 2, Math.max(4, right - left + 2), 2 * LANE + 10);
      }
    }
  }

  stepAt(x) {
    return this.shown?.findLast((item) => x >= item.left - 1 && x <= item.right + 1)?.step;
  }
}

/** A decode pass: one slice in the colour of each request, from the bottom up. */
function stack(context, left, width, requests, largest) {
  const bottom = 10 + 2 * LANE;
  const each = LANE / largest;
  requests.forEach((handle, index) => {
    context.fillStyle = color(handle);
    context.fillRect(left, bottom - (index + 1) * each, width, each > 3 ? each - 0.7 : each);
  });
}

function describe(step) {
  const ms = (1000 * (step.collected - step.began)).toFixed(1);
  const what = step.kind === "prefill" ? `${step.num_tokens} prompt tokens of` : "one token for each of";
  return `Pass ${step.number}: ${step.kind}, ${ms} ms, ${what} ${step.requests.length} request(s). (engine_core/model_runner.py, run_${step.kind})`;
}
