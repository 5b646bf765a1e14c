// Where a camera is picked: presets, the dial with its four axes, and the drawing of the path.

import { AXES, amountsWords, cameraOf, pathOf, presetWords, still } from "./camera.js";
import { Dial } from "./dial.js";
import { h } from "./dom.js";
import { Preview } from "./frustum.js";

export class CameraPicker {
  /** model: as the service describes it; onchange: () after another camera was picked. */
  constructor(model, onchange) {
    this.model = model;
    this.onchange = onchange;
    this.presets = new Map(model.presets.map((name) => [name, model.preset_poses[name]]));
    this.amounts = { ...still(), arc: -30 };
    this.axis = "arc";
    this.preset = null;
    this.earlier = [];
    this.dial = new Dial((value) => this.#setAxis(this.axis, value));
    this.canvas = h("canvas", { class: "preview", role: "img", tabindex: "0" });
    this.words = h("strong", { id: "camera-words" });
    this.code = h("code", { class: "fine" });
    this.chips = new Map();
    this.rows = new Map();
    this.element = h("div", { class: "cameras" },
      h("div", { class: "camera-dial" }, this.dial.element),
      h("div", { class: "camera-axes" }, this.#axes(), h("p", { class: "fine" },
        "Drag the dial or use the arrow keys; with Shift, ten steps. Moves add up.")),
      h("figure", { class: "camera-preview" }, this.canvas,
        h("figcaption", null, this.words, this.code)),
      this.#presets());
    this.preview = new Preview(this.canvas);
    this.#show();
  }

  #presets() {
    const list = h("div", {
      class: "chips presets", role: "group", "aria-label": "Preset cameras",
    });
    for (const name of this.presets.keys()) {
      const chip = h("button", {
        type: "button", class: "chip", "data-preset": name, "aria-pressed": "false",
        onclick: () => this.#setPreset(name),
      }, presetWords(name));
      this.chips.set(name, chip);
      list.append(chip);
    }
    return list;
  }

  #axes() {
    const list = h("div", { class: "axes", role: "group", "aria-label": "Free camera" });
    for (const [axis, { name, unit, limit, step }] of Object.entries(AXES)) {
      const choose = h("button", {
        type: "button", class: "axis-name", "aria-pressed": "false",
        "aria-label": `${name} on the dial`, onclick: () => this.#setAxis(axis, this.amounts[axis]),
      }, name);
      const field = h("input", {
        type: "number", min: -limit, max: limit, step: "any", id: `axis-${axis}`,
        "aria-label": `${name} in ${unit === "°" ? "degrees" : "metres"}`,
        onfocus: () => this.#setAxis(axis, this.amounts[axis], field),
        oninput: () => this.#typed(axis, field),
        onblur: () => this.#show(),
        onkeydown: (event) => this.#stepField(event, axis, step),
      });
      const row = h("div", { class: "axis" }, choose, field,
        h("span", { class: "axis-unit", "aria-hidden": "true" }, unit.trim()));
      this.rows.set(axis, { row, choose, field });
      list.append(row);
    }
    return list;
  }

  /** Arrow keys in a field step as the dial does, not by the browser's own step of 1. */
  #stepField(event, axis, step) {
    const direction = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (!direction) return;
    event.preventDefault();
    const { limit } = AXES[axis];
    const next = this.amounts[axis] + direction * step * (event.shiftKey ? 10 : 1);
    this.#setAxis(axis, Number(Math.max(-limit, Math.min(limit, next)).toFixed(2)));
  }

  #typed(axis, field) {
    const value = Number(field.value);
    const isUsable = field.value !== "" && field.validity.valid && Number.isFinite(value);
    field.classList.toggle("wrong", !isUsable && field.value !== "");
    if (isUsable) this.#setAxis(axis, value, field);
  }

  #setAxis(axis, value, typing = null) {
    if (value !== this.amounts[axis]) this.preset = null;
    this.axis = axis;
    this.amounts[axis] = value;
    this.#show(typing);
  }

  #setPreset(name) {
    this.preset = this.preset === name ? null : name;
    this.#show();
  }

  /** typing: the field that must not be written to under the user's hands. */
  #show(typing = null) {
    const camera = this.camera;
    this.dial.show(AXES[this.axis], this.amounts[this.axis]);
    this.element.classList.toggle("has-preset", this.preset !== null);
    for (const [axis, { row, choose, field }] of this.rows) {
      row.classList.toggle("current", axis === this.axis);
      choose.setAttribute("aria-pressed", axis === this.axis);
      if (field !== typing) {
        field.value = this.amounts[axis];
        field.classList.remove("wrong");
      }
    }
    for (const [name, chip] of this.chips) chip.setAttribute("aria-pressed", name === this.preset);
    this.words.textContent = this.preset ? presetWords(this.preset) : amountsWords(this.amounts);
    this.code.textContent = camera;
    this.#draw();
    this.onchange();
  }

  #draw() {
    const [height, width] = this.model.size;
    // turns with the same camera lie on one another, under all of their numbers
    const others = new Map();
    for (const { number, camera } of this.earlier) {
      const poses = pathOf(camera, this.presets);
      const key = JSON.stringify(camera);
      const label = others.has(key) ? `${others.get(key).label}, ${number}` : String(number);
      if (poses) others.set(key, { poses, label });
    }
    this.preview.show({
      path: pathOf(this.camera, this.presets),
      others: [...others.values()],
      aspect: height / width,
      words: `Preview of the camera: ${this.words.textContent}, beside the source's camera and `
        + `${this.earlier.length} earlier turns. Arrow keys turn the view.`,
    });
  }

  /** What to ask for. */
  get camera() {
    return this.preset ?? cameraOf(this.amounts);
  }

  /** turns: {number, camera} of the session's, drawn beside the next one. */
  setEarlier(turns) {
    this.earlier = turns;
    this.#draw();
  }

  redraw() {
    this.preview.draw();
  }
}
