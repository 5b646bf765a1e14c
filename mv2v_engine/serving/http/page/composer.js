// What comes next: a camera or an instruction, how many variants of it, and asking for them.

import * as api from "./api.js";
import { CameraPicker } from "./cameras.js";
import { $, keepKind, onClick, partsOf, replace } from "./dom.js";
import { list, plural } from "./format.js";
import { attempt, problem } from "./notices.js";

const SEEDS = 2 ** 31;

export class Composer {
  /**
   * root: where it stands; model: as the service describes it; player: of what is shown; onsent:
   * (session, its job).
   */
  constructor(root, model, player, onsent) {
    this.onsent = onsent;
    keepKind(root, model.kind);
    Object.assign(this, partsOf(root)); // state, guides
    this.picker = model.kind === "edits" ? null : new CameraPicker(model, player);
    this.typed = $("prompt") ?? $("say");
    const form = this.form = root.querySelector("form");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      attempt($("render"), this.state, async () => this.send(await this.#requests()));
    });
    form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    });
    onClick(root, { dice: () => { $("seed").value = Math.floor(Math.random() * SEEDS); } });
    for (const field of form.elements) {
      if (field.name in model) field.value = model[field.name];
    }
    root.dataset.kind = model.kind;
  }

  /** One for each variant; the seeds follow one another. */
  async #requests() {
    const chosen = { seed: 0 };
    if (this.picker) chosen.camera = await this.picker.asked();
    for (const { name, value, type } of this.form.elements) {
      if (name && value !== "") chosen[name] = type === "number" ? Number(value) : value;
    }
    return Array.from({ length: Number($("count").value) }, (_, index) =>
      ({ ...chosen, seed: chosen.seed + index }));
  }

  /** session: whose turns come next; turns: that it has. */
  show(session, turns) {
    if (this.session?.id !== session.id) replace(this.state);
    this.session = session;
    const { num_references: count, has_mask: isMasked } = session;
    const guides = [count && plural(count, "reference"), isMasked && "a mask"].filter(Boolean);
    const words = guides.length && `Made with ${list(guides)}, which came with the video.`;
    if (this.guides) replace(this.guides, words || null);
    this.picker?.setEarlier(
      turns.map(({ number, request }) => ({ number, camera: request.camera })));
  }

  /** Where one begins: what is typed here is what comes next. */
  focus() {
    this.typed.focus({ preventScroll: true });
  }

  /** Asks for turns. Sent again after an error, each is still one turn: the keys stay. */
  async send(requests, keys = requests.map(() => api.newKey())) {
    const { session } = this;
    replace(this.state);
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
}
