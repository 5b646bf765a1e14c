// Where a camera is picked: the dial and its axes, keyframes, presets, a file, plain words.

import { AXES, amountsWords, axisWords, cameraOf, pathOf, presetWords, still } from "./camera.js";
import { Dial } from "./dial.js";
import { $, cloned, h, partsOf, replace } from "./dom.js";
import { Preview } from "./frustum.js";
import { Keyframes, trajectoryOf } from "./keyframes.js";
import { list } from "./format.js";
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
    this.keyframes = new Keyframes(
      model.num_frames, player, () => this.moves, () => this.#show());
    this.dial = new Dial((value) => this.#setAxis(this.axis, value));
    this.element = document.querySelector(".cameras");
    this.words = $("camera-words");
    this.code = document.querySelector(".camera-preview code");
    this.fileWords = partsOf(this.element).file;
    this.rows = new Map(Object.keys(AXES).map((axis) => [axis, this.#row(axis)]));
    this.chips = new Map([...this.presets.keys()].map((name) => [name, this.#chip(name)]));
    $("say").addEventListener("input", () => {
      this.said = this.#say();
      this.said.catch(({ message }) => { $("heard").textContent = message; });
    });
    $("camera-file").addEventListener("change", () => this.#read($("camera-file")));
    this.preview = new Preview($("preview"));
    this.#show();
  }

  #chip(name) {
    const chip = h("button", {
      type: "button", class: "chip", "data-preset": name, onclick: () => this.#setPreset(name),
    }, presetWords(name));
    $("presets").append(chip);
    return chip;
  }

  /** What was said, as a move that is shown before it is asked for. */
  async #say() {
    const { parseMoves } = await import("./moves.js");
    const { amounts, unread, limited } = parseMoves($("say").value);
    const used = Object.keys(AXES).find((axis) => amounts[axis]);
    const most = limited.map((axis) => axisWords(axis, amounts[axis]));
    const heard = [
      unread.length
        && `Not understood: ${unread.join(", ")}. Try "orbit right 30" or "zoom in a little".`,
      most.length && `It goes no further than ${list(most)}.`,
    ].filter(Boolean).join(" ");
    $("heard").textContent = heard;
    this.unheard = null;
    if (!$("say").value.trim()) return;
    this.#plain();
    this.keyframes.clear();
    this.amounts = amounts;
    if (unread.length && !used) this.unheard = heard;
    if (used) this.axis = used;
    this.#show();
  }

  /** No preset, no file, and no words that say nothing. */
  #plain() {
    this.preset = this.file = this.unheard = null;
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
    this.#plain();
    this.file = { spec: file.name, files: { [file.name]: content } };
    this.#show();
  }

  /** The amounts that the dial turns: the picked key's, or the move's. */
  get moves() {
    return this.keyframes.amounts ?? this.amounts;
  }

  #row(axis) {
    const { name, unit, limit } = AXES[axis];
    const content = cloned("axis");
    const row = content.firstElementChild;
    const { choose, field, unit: sign } = partsOf(row);
    choose.textContent = name;
    choose.ariaLabel = `${name} on the dial`;
    choose.addEventListener("click", () => this.#setAxis(axis, this.moves[axis]));
    Object.assign(field, {
      id: `axis-${axis}`, min: -limit, max: limit,
      ariaLabel: `${name} in ${unit === "°" ? "degrees" : "metres"}`,
      onfocus: () => this.#setAxis(axis, this.moves[axis], field),
      oninput: () => this.#typed(axis, field),
      onblur: () => this.#show(),
      // in steps of the dial's, not by the browser's own of 1
      onkeydown: (event) => ["ArrowUp", "ArrowDown"].includes(event.key) && this.dial.key(event),
    });
    sign.textContent = unit.trim();
    $("axes").append(row);
    return { row, choose, field };
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
    const preset = this.preset === name ? null : name;
    this.#plain();
    this.preset = preset;
    this.#show();
  }

  /** typing: the field that must not be written to under the user's hands. */
  #show(typing = null) {
    const { camera, moves } = this;
    this.dial.show(AXES[this.axis], moves[this.axis]);
    this.element.classList.toggle("has-preset", Boolean(this.preset ?? this.file));
    for (const [axis, { row, choose, field }] of this.rows) {
      row.classList.toggle("current", axis === this.axis);
      choose.ariaPressed = axis === this.axis;
      if (field !== typing) {
        field.value = moves[axis];
        field.classList.remove("wrong");
      }
    }
    for (const [name, chip] of this.chips) chip.ariaPressed = name === this.preset;
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

  /** What to ask for, once what was said last is read; an error if that says no move. */
  async asked() {
    await this.said;
    if (this.unheard) throw new Error(this.unheard);
    return this.camera;
  }

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
}
