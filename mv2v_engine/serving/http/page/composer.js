// What comes next: a camera or an instruction, how many variants of it, and asking for them.

import * as api from "./api.js";
import { CameraPicker } from "./cameras.js";
import { h, replace } from "./dom.js";
import { icon } from "./icons.js";
import { busy, clear, problem } from "./notices.js";

const MEMORY = {
  retrieved: "Relevant turns",
  previous: "The last turn",
  none: "Nothing",
};
const MOST = 4; // variants at once
const SEEDS = 2 ** 31;

function field(label, input, hint = null) {
  return h("label", { class: "field" }, h("span", null, label), input,
    hint && h("span", { class: "fine" }, hint));
}

export class Composer {
  /**
   * root: where it stands; model: as the service describes it; player: of what is shown; onsent:
   * (session, its job).
   */
  constructor(root, model, player, onsent) {
    this.model = model;
    this.onsent = onsent;
    this.isEditing = model.kind === "edits";
    this.state = h("div");
    this.sendButton = h("button", { class: "button primary large", type: "submit", id: "render" },
      this.isEditing ? "Edit the video" : "Render this view");
    this.picker = this.isEditing ? null : new CameraPicker(model, player);
    const asked = this.isEditing ? this.#instruction()
      : [this.picker.sayField, this.picker.heard];
    this.form = h("form", {
      onsubmit: (event) => {
        event.preventDefault();
        busy(this.sendButton, () => this.send(this.#requests()), (error) => { throw error; });
      },
    }, asked, h("div", { class: "row send" }, this.sendButton, this.#variants()), this.state,
    this.picker?.figure, this.picker?.element, this.#settings());
    replace(root,
      h("h2", { id: "composer-title" }, this.isEditing ? "Next edit" : "Next view"), this.form);
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

  /** How many, and the number that each one's chance begins with. */
  #variants() {
    this.count = h("select", { id: "count", "aria-label": "How many variants" },
      Array.from({ length: MOST }, (_, index) =>
        h("option", { value: index + 1 }, `${index + 1}×`)));
    this.seed = h("input", {
      type: "number", id: "seed", min: 0, step: 1, value: 0, inputmode: "numeric",
      "aria-label": "Seed", title: "Seed: the same number makes the same picture again",
    });
    const dice = h("button", {
      type: "button", class: "icon", "aria-label": "Throw the dice for another seed",
      title: "Another seed",
      onclick: () => { this.seed.value = Math.floor(Math.random() * SEEDS); },
    }, icon("dice"));
    return h("span", { class: "variants" }, this.count, this.seed, dice);
  }

  #settings() {
    const number = (id, value, min, step) =>
      h("input", { type: "number", id, min, step, value, inputmode: "decimal" });
    this.steps = number("steps", this.model.num_inference_steps, 1, 1);
    this.steps.max = 1000;
    this.guidance = number("guidance", this.model.guidance_scale, 0, "any");
    // an edit remembers windows of its own, not other turns
    const memory = Object.entries(MEMORY).filter(
      ([mode]) => !this.isEditing || mode !== "previous");
    this.memory = h("select", { id: "memory" }, memory.map(([mode, words]) =>
      h("option", { value: mode, selected: mode === this.model.memory }, words)));
    return h("details", { class: "settings" },
      h("summary", null, "Settings"),
      h("div", { class: "fields" },
        field("Steps", this.steps), field("Guidance", this.guidance),
        field("Remember", this.memory)));
  }

  /** One for each variant; the seeds follow one another. */
  #requests() {
    const chosen = this.isEditing ? { prompt: this.prompt.value } : { camera: this.picker.camera };
    const numbers = { num_inference_steps: this.steps, guidance_scale: this.guidance };
    for (const [name, input] of Object.entries(numbers)) {
      if (input.value !== "") chosen[name] = Number(input.value);
    }
    const first = this.seed.value === "" ? 0 : Number(this.seed.value);
    return Array.from({ length: Number(this.count.value) }, (_, index) =>
      ({ ...chosen, memory: this.memory.value, seed: first + index }));
  }

  /** session: whose turns come next; turns: that it has. */
  show(session, turns) {
    if (this.session?.id !== session.id) clear(this.state);
    this.session = session;
    this.picker?.setEarlier(
      turns.map(({ number, request }) => ({ number, camera: request.camera })));
  }

  setFrame(frame) {
    this.picker?.setFrame(frame);
  }

  /** Where one begins: what is typed here is what comes next. */
  focus() {
    (this.prompt ?? this.picker.said).focus({ preventScroll: true });
  }

  /** Asks for turns. Sent again after an error, each is still one turn: the keys stay. */
  async send(requests, keys = requests.map(() => api.newKey())) {
    const { session } = this;
    clear(this.state);
    for (const [place, request] of requests.entries()) {
      try {
        this.onsent(session, await api.submit(session.id, request, keys[place]));
      } catch (error) {
        // of another session than is shown now, it would be sent again to the wrong one
        if (this.session.id !== session.id) return;
        problem(this.state, error, () => this.send(requests.slice(place), keys.slice(place)));
        return;
      }
    }
  }

  redraw() {
    this.picker?.redraw();
  }
}
