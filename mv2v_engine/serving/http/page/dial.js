// A dial of 270 degrees for one number: dragged, turned by arrow keys, read as a slider.

import { svg } from "./dom.js";
import { signed } from "./format.js";

const SWEEP = 135; // degrees to either side of the top
const RADIUS = 84;
const CENTRE = 110;

function at(degrees, radius) {
  const angle = ((degrees - 90) * Math.PI) / 180;
  return [CENTRE + radius * Math.cos(angle), CENTRE + radius * Math.sin(angle)];
}

function arcPath(from, to, radius) {
  const [low, high] = from < to ? [from, to] : [to, from];
  const [[x1, y1], [x2, y2]] = [at(low, radius), at(high, radius)];
  const isLong = high - low > 180 ? 1 : 0;
  const [start, end] = [`${x1.toFixed(2)} ${y1.toFixed(2)}`, `${x2.toFixed(2)} ${y2.toFixed(2)}`];
  return `M${start}A${radius} ${radius} 0 ${isLong} 1 ${end}`;
}

export class Dial {
  /** onchange: (value), after the user turned it. */
  constructor(onchange) {
    this.onchange = onchange;
    this.value = 0;
    this.fill = svg("path", { class: "dial-fill" });
    this.knob = svg("g", { class: "dial-knob" },
      svg("circle", { r: 15, class: "dial-grip" }), svg("circle", { r: 4, class: "dial-dot" }));
    this.number = svg("text", { x: CENTRE, y: CENTRE + 2, class: "dial-number" });
    this.words = svg("text", { x: CENTRE, y: CENTRE + 28, class: "dial-words" });
    this.low = svg("text", { class: "dial-end", x: 38, y: 194 });
    this.high = svg("text", { class: "dial-end", x: 182, y: 194 });
    this.element = svg("svg", {
      viewBox: "0 0 220 206", class: "dial", role: "slider", tabindex: "0",
      onkeydown: (event) => this.#key(event),
      onpointerdown: (event) => this.#grab(event),
      onpointermove: (event) => this.#drag(event),
      ondblclick: () => this.#turn(0),
    },
    svg("path", { class: "dial-track", d: arcPath(-SWEEP, SWEEP, RADIUS) }),
    this.#ticks(), this.fill, this.knob, this.number, this.words, this.low, this.high);
  }

  #ticks() {
    const ticks = svg("g", { class: "dial-ticks" });
    for (let degrees = -SWEEP; degrees <= SWEEP; degrees += 15) {
      const inner = RADIUS - (degrees ? 18 : 23);
      const [[x1, y1], [x2, y2]] = [at(degrees, RADIUS - 14), at(degrees, inner)];
      ticks.append(svg("line", { x1, y1, x2, y2 }));
    }
    return ticks;
  }

  /** Takes another axis and its value (see camera.AXES). */
  show(axis, value) {
    this.axis = axis;
    this.value = value;
    const { name, unit, limit, positive, negative } = axis;
    const angle = (value / limit) * SWEEP;
    const [x, y] = at(angle, RADIUS);
    this.fill.setAttribute("d", angle ? arcPath(0, angle, RADIUS) : "");
    this.knob.setAttribute("transform", `translate(${x.toFixed(2)} ${y.toFixed(2)})`);
    const direction = value === 0 ? "" : value < 0 ? negative : positive;
    this.number.textContent = signed(Math.abs(value)) + unit;
    this.words.textContent = `${name} ${direction}`.trim();
    this.low.textContent = negative;
    this.high.textContent = positive;
    const attributes = {
      "aria-label": `${name} dial`,
      "aria-valuemin": -limit,
      "aria-valuemax": limit,
      "aria-valuenow": value,
      "aria-valuetext": `${signed(Math.abs(value))}${unit} ${direction}`.trim(),
    };
    for (const [key, text] of Object.entries(attributes)) this.element.setAttribute(key, text);
  }

  #turn(value) {
    const { limit, step } = this.axis;
    const rounded = Math.round(value / step) * step;
    const next = Number(Math.min(limit, Math.max(-limit, rounded)).toFixed(2));
    if (next === this.value) return;
    this.show(this.axis, next);
    this.onchange(next);
  }

  #key(event) {
    const { limit, step } = this.axis;
    const steps = event.shiftKey ? 10 : 1;
    const moves = {
      ArrowRight: this.value + steps * step, ArrowUp: this.value + steps * step,
      ArrowLeft: this.value - steps * step, ArrowDown: this.value - steps * step,
      PageUp: this.value + 10 * step, PageDown: this.value - 10 * step,
      Home: -limit, End: limit, 0: 0, Delete: 0, Backspace: 0,
    };
    if (!(event.key in moves) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    this.#turn(moves[event.key]);
  }

  #angle(event) {
    const box = this.element.getBoundingClientRect();
    const scale = 220 / box.width;
    const x = (event.clientX - box.left) * scale - CENTRE;
    const y = (event.clientY - box.top) * scale - CENTRE;
    return { degrees: (Math.atan2(x, -y) * 180) / Math.PI, radius: Math.hypot(x, y) };
  }

  #grab(event) {
    const { degrees, radius } = this.#angle(event);
    // a finger that scrolls the page across the middle does not turn it
    if (radius < 44 || radius > 110 || event.button !== 0) return;
    this.element.setPointerCapture(event.pointerId);
    this.element.focus({ preventScroll: true });
    this.lastAngle = degrees;
    this.#toAngle(degrees);
    event.preventDefault();
  }

  #drag(event) {
    if (!this.element.hasPointerCapture(event.pointerId)) return;
    const { degrees } = this.#angle(event);
    // through the gap at the bottom it stays at the end that it came from
    if (Math.abs(degrees - this.lastAngle) > 180) return;
    this.lastAngle = degrees;
    this.#toAngle(degrees);
  }

  #toAngle(degrees) {
    const held = Math.max(-SWEEP, Math.min(SWEEP, degrees));
    this.#turn((held / SWEEP) * this.axis.limit);
  }
}
