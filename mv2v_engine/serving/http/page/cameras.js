// Where a camera is picked: the dial and its axes, keyframes, presets, a file, plain words.

import { AXES, amountsWords, cameraOf, pathOf, presetWords, still } from "./camera.js";
import { Dial } from "./dial.js";
import { h, replace } from "./dom.js";
import { Preview } from "./frustum.js";
import { Keyframes, trajectoryOf } from "./keyframes.js";
import { parseMoves } from "./moves.js";
import { button } from "./notices.js";

export class CameraPicker {
  /** model: as the service describes it; player: that keyframes are set along. */
  constructor(model, player) {
    this.model = model;
    this.presets = new Map(model.presets.map((name) => [name, model.preset_poses[name]]));
    this.amounts = { ...still(), arc: -30 };
    this.axis = "arc";
    this.preset = null;
    this.file = null; // {spec, files}
    this.earlier = [];
    this.keyframes = new Keyframes(model.num_frames, {
      onchange: () => this.#show(), onseek: (frame) => player.seek(frame),
    });
    this.keyframes.current = () => this.moves;
    this.dial = new Dial((value) => this.#setAxis(this.axis, value));
    this.canvas = h("canvas", { class: "preview", role: "img", tabindex: "0" });
    this.words = h("strong", { id: "camera-words" });
    this.code = h("code", { class: "fine" });
    this.chips = new Map();
    this.rows = new Map();
    this.said = h("input", {
      type: "text", id: "say", maxlength: 200, autocomplete: "off", spellcheck: "false",
      placeholder: "move left and look down", oninput: () => this.#say(),
    });
    this.heard = h("p", { class: "fine", id: "heard" });
    this.said.setAttribute("aria-describedby", "heard camera-words");
    this.sayField = h("label", { class: "field" }, h("span", null, "Say the move"), this.said);
    this.figure = h("figure", { class: "camera-preview" }, this.canvas,
      h("figcaption", null, this.words, this.code));
    this.element = h("div", { class: "cameras" },
      h("div", { class: "camera-dial" }, this.dial.element),
      h("div", { class: "camera-axes" }, this.#axes()),
      h("div", { class: "group" }, h("h3", { class: "label" }, "Along the way"),
        this.keyframes.element),
      h("div", { class: "group" }, h("h3", { class: "label" }, "Presets"), this.#presets()),
      h("div", { class: "group" }, h("h3", { class: "label" }, "From a file"), this.#files()));
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

  /** What was said, as a move that is shown before it is asked for. */
  #say() {
    const { amounts, unread } = parseMoves(this.said.value);
    this.heard.textContent = unread.length
      ? `Not understood: ${unread.join(", ")}. Try "orbit right 30" or "zoom in a little".` : "";
    if (!this.said.value.trim()) return;
    this.#plain();
    this.keyframes.clear();
    this.amounts = amounts;
    const used = Object.keys(AXES).find((axis) => amounts[axis]);
    if (used) this.axis = used;
    this.#show();
  }

  /** No preset and no file. */
  #plain() {
    this.preset = this.file = null;
  }

  #files() {
    const input = h("input", {
      type: "file", class: "quiet", id: "camera-file", "aria-label": "Camera file",
      accept: ".json,.txt,.csv,.npy,.npz,.tum,.kitti", onchange: () => this.#read(input),
    });
    this.fileWords = h("div", { class: "row" });
    return h("div", { class: "row" }, input,
      h("label", { for: "camera-file", class: "button small" }, "Choose a camera file"),
      this.fileWords);
  }

  async #read(input) {
    const [file] = input.files;
    input.value = "";
    if (!file) return;
    const bytes = new Uint8Array(await file.arrayBuffer());
    let content;
    try {
      content = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
    } catch {
      content = { base64: btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join("")) };
    }
    this.preset = null;
    this.file = { spec: file.name, files: { [file.name]: content } };
    this.#show();
  }

  /** The amounts that the dial turns: the picked key's, or the move's. */
  get moves() {
    return this.keyframes.amounts ?? this.amounts;
  }

  setFrame(frame) {
    this.keyframes.setFrame(frame);
  }

  #axes() {
    const list = h("div", { class: "axes", role: "group", "aria-label": "Free camera" });
    for (const [axis, { name, unit, limit, step }] of Object.entries(AXES)) {
      const choose = h("button", {
        type: "button", class: "axis-name", "aria-pressed": "false",
        "aria-label": `${name} on the dial`, onclick: () => this.#setAxis(axis, this.moves[axis]),
      }, name);
      const field = h("input", {
        type: "number", min: -limit, max: limit, step: "any", id: `axis-${axis}`,
        "aria-label": `${name} in ${unit === "°" ? "degrees" : "metres"}`,
        onfocus: () => this.#setAxis(axis, this.moves[axis], field),
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
    const next = this.moves[axis] + direction * step * (event.shiftKey ? 10 : 1);
    this.#setAxis(axis, Number(Math.max(-limit, Math.min(limit, next)).toFixed(2)));
  }

  #typed(axis, field) {
    const value = Number(field.value);
    const isUsable = field.value !== "" && field.validity.valid && Number.isFinite(value);
    field.classList.toggle("wrong", !isUsable && field.value !== "");
    if (isUsable) this.#setAxis(axis, value, field);
  }

  #setAxis(axis, value, typing = null) {
    if (value !== this.moves[axis]) this.#plain();
    this.axis = axis;
    if (this.keyframes.isOn) this.keyframes.edit({ ...this.moves, [axis]: value });
    else this.amounts = { ...this.amounts, [axis]: value };
    this.#show(typing);
  }

  #setPreset(name) {
    this.preset = this.preset === name ? null : name;
    this.file = null;
    this.#show();
  }

  /** typing: the field that must not be written to under the user's hands. */
  #show(typing = null) {
    const { camera, moves } = this;
    this.dial.show(AXES[this.axis], moves[this.axis]);
    this.element.classList.toggle("has-preset", Boolean(this.preset ?? this.file));
    for (const [axis, { row, choose, field }] of this.rows) {
      row.classList.toggle("current", axis === this.axis);
      choose.setAttribute("aria-pressed", axis === this.axis);
      if (field !== typing) {
        field.value = moves[axis];
        field.classList.remove("wrong");
      }
    }
    for (const [name, chip] of this.chips) chip.setAttribute("aria-pressed", name === this.preset);
    this.words.textContent = this.#words();
    this.code.textContent = typeof camera === "string" ? camera : "";
    replace(this.fileWords, this.file && [h("span", null, this.file.spec),
      button("Leave it out", () => {
        this.file = null;
        this.#show();
        this.dial.element.focus();
      })]);
    this.#draw();
  }

  #words() {
    if (this.file) return this.file.spec;
    if (this.preset) return presetWords(this.preset);
    if (this.keyframes.isOn) return `${this.keyframes.keys.size} keyframes`;
    return amountsWords(this.amounts);
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
    if (this.file || this.preset) return this.file ?? this.preset;
    if (!this.keyframes.isOn) return cameraOf(this.amounts);
    return trajectoryOf(this.keyframes.sorted, this.model.num_frames, this.model.size);
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
