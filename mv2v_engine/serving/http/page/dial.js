// A dial of 270 degrees for one number: dragged, turned by arrow keys, read as a slider.

import { $, partsOf, setVars } from "./dom.js";
import { signed } from "./format.js";

const SWEEP = 135; // degrees to either side of the top
const CENTRE = 110;

export class Dial {
  /** onchange: (value), after the user turned it. */
  constructor(onchange) {
    this.onchange = onchange;
    this.value = 0;
    this.element = $("dial");
    this.parts = partsOf(this.element);
    const listeners = {
      keydown: (event) => this.key(event),
      pointerdown: (event) => this.#grab(event),
      pointermove: (event) => this.#drag(event),
      dblclick: () => this.#turn(0),
    };
    for (const [name, listener] of Object.entries(listeners)) {
      this.element.addEventListener(name, listener);
    }
  }

  /** Takes another axis and its value (see camera.AXES). */
  show(axis, value) {
    this.axis = axis;
    this.value = value;
    const { name, unit, limit, positive, negative } = axis;
    setVars(this.element, { "--turn": (value / limit) * SWEEP });
    const direction = value === 0 ? "" : value < 0 ? negative : positive;
    const texts = {
      number: signed(Math.abs(value)) + unit, words: `${name} ${direction}`.trim(),
      low: negative, high: positive,
    };
    for (const [part, text] of Object.entries(texts)) this.parts[part].textContent = text;
    Object.assign(this.element, {
      ariaLabel: `${name} dial`,
      ariaValueMin: -limit,
      ariaValueMax: limit,
      ariaValueNow: value,
      ariaValueText: `${texts.number} ${direction}`.trim(),
    });
  }

  #turn(value) {
    const { limit, step } = this.axis;
    const rounded = Math.round(value / step) * step;
    const next = Number(Math.min(limit, Math.max(-limit, rounded)).toFixed(2));
    if (next === this.value) return;
    this.show(this.axis, next);
    this.onchange(next);
  }

  key(event) {
    const { limit, step } = this.axis;
    const steps = {
      ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10, PageDown: -10,
    }[event.key] * (event.shiftKey ? 10 : 1);
    const places = { Home: -limit, End: limit, 0: 0, Delete: 0, Backspace: 0 };
    const value = places[event.key] ?? this.value + steps * step;
    if (Number.isNaN(value) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    this.#turn(value);
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
