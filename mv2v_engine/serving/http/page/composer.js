// The form for the next turn: a camera or an instruction, the sampler's settings, and sending it.

import * as api from "./api.js";
import { CameraPicker } from "./cameras.js";
import { h, replace } from "./dom.js";
import { clear, problem } from "./notices.js";

const MEMORY = {
  retrieved: "Relevant turns",
  previous: "The last turn",
  none: "Nothing",
};

function field(label, input, hint = null) {
  return h("label", { class: "field" }, h("span", null, label), input,
    hint && h("span", { class: "fine" }, hint));
}

export class Composer {
  /** root: where it stands; model: as the service describes it; onsent: (session, its job). */
  constructor(root, model, onsent) {
    this.model = model;
    this.onsent = onsent;
    this.isEditing = model.kind === "edits";
    this.state = h("div");
    this.sendButton = h("button", { class: "button primary large", type: "submit" },
      this.isEditing ? "Edit the video" : "Render this view");
    this.pickers = this.isEditing ? this.#instruction() : this.#camera();
    this.form = h("form", {
      onsubmit: (event) => {
        event.preventDefault();
        this.send(this.#request());
      },
    }, this.pickers, this.#settings(), this.state,
    h("div", { class: "row send" }, this.sendButton));
    replace(root,
      h("h2", { id: "composer-title" }, this.isEditing ? "Next edit" : "Next view"), this.form);
  }

  #camera() {
    this.picker = new CameraPicker(this.model, () => {});
    return this.picker.element;
  }

  #instruction() {
    this.prompt = h("textarea", {
      id: "prompt", rows: 3, required: true, placeholder: "make the sphere red",
      onkeydown: (event) => {
        if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.form.requestSubmit();
      },
    });
    return field("Instruction", this.prompt, "What to change; everything else stays as it is.");
  }

  #settings() {
    const number = (id, value, min, step) =>
      h("input", { type: "number", id, min, step, value, inputmode: "decimal" });
    this.steps = number("steps", this.model.num_inference_steps, 1, 1);
    this.steps.max = 1000;
    this.guidance = number("guidance", this.model.guidance_scale, 0, "any");
    this.seed = number("seed", 0, 0, 1);
    // an edit remembers windows of its own, not other turns
    const memory = Object.entries(MEMORY).filter(
      ([mode]) => !this.isEditing || mode !== "previous");
    this.memory = h("select", { id: "memory" }, memory.map(([mode, words]) =>
      h("option", { value: mode, selected: mode === this.model.memory }, words)));
    return h("details", { class: "settings" },
      h("summary", null, "Settings"),
      h("div", { class: "fields" },
        field("Steps", this.steps), field("Guidance", this.guidance),
        field("Seed", this.seed), field("Remember", this.memory)));
  }

  #request() {
    const chosen = this.isEditing ? { prompt: this.prompt.value } : { camera: this.picker.camera };
    const numbers = {
      num_inference_steps: this.steps, guidance_scale: this.guidance, seed: this.seed,
    };
    for (const [name, input] of Object.entries(numbers)) {
      if (input.value !== "") chosen[name] = Number(input.value);
    }
    return { ...chosen, memory: this.memory.value };
  }

  /** session: whose turns come next; turns: that it has. */
  show(session, turns) {
    if (this.session?.id !== session.id) clear(this.state);
    this.session = session;
    if (!this.isEditing) {
      this.picker.setEarlier(
        turns.map(({ number, request }) => ({ number, camera: request.camera })));
    }
  }

  /** Asks for a turn. Sent again after an error, it is still one turn: the key stays. */
  async send(request, key = api.newKey()) {
    const { session } = this;
    clear(this.state);
    this.sendButton.disabled = true;
    try {
      this.onsent(session, await api.submit(session.id, request, key));
    } catch (error) {
      // of another session than is shown now, it would be sent again to the wrong one
      if (this.session.id !== session.id) return;
      problem(this.state, error, () => this.send(request, key));
    } finally {
      this.sendButton.disabled = false;
    }
  }

  redraw() {
    this.picker?.redraw();
  }
}
