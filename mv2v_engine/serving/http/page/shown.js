// What is shown, and what can be done with it: its name, its notes, keeping, leaving, deleting it.

import * as api from "./api.js";
import { requestWords } from "./camera.js";
import { $, h, replace } from "./dom.js";
import { bytes, list } from "./format.js";
import { busy, button, clear, problem } from "./notices.js";
import { costSection, memorySection } from "./report.js";

/** A text that is written back when it is left; what somebody else wrote meanwhile is not lost. */
export function editable(tag, props, { value, label, save, place }) {
  const input = h(tag, {
    ...props, "aria-label": label,
    onchange: async () => {
      clear(place);
      try {
        await save(input.value);
      } catch (error) {
        problem(place, error, () => input.dispatchEvent(new Event("change")));
      }
    },
    onkeydown: (event) => {
      if (event.key === "Enter" && tag === "input") input.dispatchEvent(new Event("change"));
    },
  });
  input.value = value;
  return input;
}

export class Shown {
  /**
   * model: as the service describes it. actions: {open: (number), branch: (number), edit: (turn,
   * changes), remove: (turn)}.
   */
  constructor(model, actions) {
    Object.assign(this, { model, actions });
    this.root = $("shown");
    this.key = null;
    this.isOpen = false; // what is behind a picture, of one turn as of the next
  }

  clear() {
    this.key = null;
    replace(this.root);
  }

  /** Of the source. */
  showSource(session) {
    this.#keep(`source ${session.id}`, () => {
      const state = h("div");
      const fresh = button("Start afresh", () => this.#attempt(fresh, state, () =>
        this.actions.branch(0)), "branch");
      fresh.title = "The same video again, without turns";
      replace(this.root, session.warnings.map((words) => h("p", { class: "note" }, words)),
        state, h("div", { class: "row" }, fresh));
    });
  }

  /** Of a turn. */
  show(session, turn) {
    const key = JSON.stringify([session.id, turn]);
    this.#keep(key, () => this.#turn(session, turn));
  }

  /** Made anew only where something is other than it was, so that nobody loses a cursor. */
  #keep(key, make) {
    if (key === this.key) return;
    const focused = this.root.contains(document.activeElement)
      ? document.activeElement.dataset.part : null;
    this.key = key;
    make();
    if (focused) this.root.querySelector(`[data-part="${focused}"]`)?.focus();
  }

  #turn(session, turn) {
    const state = h("div");
    const { number } = turn;
    const save = (changes) => this.actions.edit(turn, changes);
    const name = editable("input", {
      type: "text", class: "name", maxlength: 200, placeholder: requestWords(turn.request),
      "data-part": "name", id: "turn-name",
    }, { value: turn.name, label: `Name of turn ${number}`, place: state,
      save: (value) => save({ name: value }) });
    const notes = editable("textarea", {
      rows: 2, maxlength: 8192, placeholder: "Notes", "data-part": "notes",
    }, { value: turn.notes, label: `Notes on turn ${number}`, place: state,
      save: (value) => save({ notes: value }) });
    const act = (part, label, action, glyph) => {
      const pressed = button(label, () => this.#attempt(pressed, state, action), glyph);
      pressed.dataset.part = part;
      return pressed;
    };
    const star = act("star", "Favourite", () => save({ is_favourite: !turn.is_favourite }), "star");
    star.setAttribute("aria-pressed", turn.is_favourite);
    const download = act("download", "Download", () => api.download(
      api.videoPath(session.id, number), fileName(session, `turn_${number}.mp4`)), "download");
    download.title = `mp4, ${bytes(turn.bytes)} with what it is made again from`;
    // an edit's turns do not build on each other, so that there is nothing to branch from
    const fork = session.kind === "views"
      && act("branch", "Branch", () => this.actions.branch(number), "branch");
    if (fork) fork.title = `Go on from here in a new history, with turns 1 to ${number}`;
    const remove = act("delete", "Delete turn", () => this.actions.remove(turn), "trash");
    replace(this.root,
      h("div", { class: "shown-bar" }, h("h2", { class: "shown-title" }, `Turn ${number}`), name,
        h("div", { class: "row tools" }, star, download, fork, remove)),
      state,
      turn.forgotten.length > 0 && h("p", { class: "note" },
        `It remembered ${list(turn.forgotten.map((other) => `turn ${other}`))}, deleted since.`),
      turn.warnings.map((words) => h("p", { class: "note" }, words)),
      notes,
      h("details", {
        class: "behind", open: this.isOpen,
        ontoggle: (event) => { this.isOpen = event.currentTarget.open; },
      }, h("summary", null, "Behind this picture"),
        h("div", { class: "behind-parts" },
          memorySection(turn.report, {
            numFrames: this.model.num_frames, open: this.actions.open }),
          costSection(turn.report))));
  }

  #attempt(pressed, state, action) {
    clear(state);
    return busy(pressed, action, (error) => problem(state, error));
  }
}

/** A file name that any system takes. */
export function fileName(session, suffix) {
  const stem = session.name.replace(/\.[^.]*$/, "").replace(/[^\p{L}\p{N}._-]+/gu, "_") || "video";
  return `${stem}_${suffix}`;
}
