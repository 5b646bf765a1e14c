// What is shown, and what can be done with it: its name, its notes, keeping, leaving, deleting it.

import * as api from "./api.js";
import { requestWords } from "./camera.js";
import { $, cloned, h, keepKind, onClick, partsOf, replace } from "./dom.js";
import { bytes, list } from "./format.js";
import { attempt, button, problem } from "./notices.js";

/**
 * Makes the fields of a piece of the page write back what they are left with; what somebody else
 * wrote meanwhile is not lost. save: ({field: value}); place: where a problem is told.
 */
export function editable(root, save, place) {
  for (const field of root.querySelectorAll("[data-field]")) {
    const change = async () => {
      replace(place);
      try {
        await save({ [field.dataset.field]: field.value });
      } catch (error) {
        problem(place, error, change);
      }
    };
    field.addEventListener("change", change);
    field.addEventListener("keydown", ({ key }) => {
      if (key === "Enter" && field.matches("input")) change();
    });
  }
}

/** What is saved of a field; what was typed over it stays. */
export function setSaved(field, saved) {
  const typed = field.value === field.defaultValue ? saved : field.value;
  field.defaultValue = saved;
  field.value = typed;
}

/** actions: by the part, what its button does, once at a time; place: where a problem is told. */
export function attemptable(root, actions, place) {
  onClick(root, Object.fromEntries(Object.entries(actions).map(([part, action]) =>
    [part, (pressed) => attempt(pressed, place, action)])));
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
    this.#keep(`source ${session.id}`, (content) => {
      const fresh = button("Start afresh", null, "branch");
      fresh.dataset.part = "fresh";
      fresh.title = "The same video again, without turns";
      const state = h("div");
      replace(content, session.warnings.map((words) => h("p", { class: "note" }, words)),
        state, h("div", { class: "row" }, fresh));
      attemptable(content, { fresh: () => this.actions.branch(0) }, state);
    });
  }

  /** Of a turn. */
  show(session, turn) {
    this.#keep(JSON.stringify([session.id, turn]), (content) =>
      this.#turn(content, session, turn));
  }

  /** Made anew only where something is other than it was, so that nobody loses a cursor. */
  #keep(key, make) {
    if (key === this.key) return;
    const { activeElement: active } = document;
    const { part, field } = this.root.contains(active) ? active.dataset : {};
    this.key = key;
    const content = h("div");
    make(content);
    replace(this.root, content);
    content.querySelector(`[data-part="${part}"], [data-field="${field}"]`)?.focus();
  }

  #turn(content, session, turn) {
    content.append(cloned("turn"));
    keepKind(content, session.kind); // an edit's turns do not build on each other
    const { title, star, download, branch, state, warnings, behind, parts } = partsOf(content);
    const { number } = turn;
    title.textContent = `Turn ${number}`;
    star.ariaPressed = turn.is_favourite;
    download.title = `mp4, ${bytes(turn.bytes)} with what it is made again from`;
    if (branch) branch.title = `Go on from here in a new history, with turns 1 to ${number}`;
    const [name, notes] = content.querySelectorAll("[data-field]");
    name.placeholder = requestWords(turn.request);
    const id = `${session.id} ${number}`;
    for (const field of [name, notes]) {
      const { field: what } = field.dataset;
      const before = this.root.querySelector(`[data-turn="${id}"] [data-field=${what}]`);
      if (before) Object.assign(field, { defaultValue: before.defaultValue, value: before.value });
      setSaved(field, turn[what]);
    }
    content.dataset.turn = id;
    name.ariaLabel = `Name of turn ${number}`;
    notes.ariaLabel = `Notes on turn ${number}`;
    const save = (changes) => this.actions.edit(turn, changes);
    editable(content, save, state);
    attemptable(content, {
      star: () => save({ is_favourite: !turn.is_favourite }),
      download: () => api.download(
        api.videoPath(session.id, number), fileName(session, `turn_${number}.mp4`)),
      branch: () => this.actions.branch(number),
      delete: () => this.actions.remove(turn),
    }, state);
    const forgotten = turn.forgotten.map((other) => `turn ${other}`);
    replace(warnings, [
      ...(forgotten.length ? [`It remembered ${list(forgotten)}, deleted since.`] : []),
      ...turn.warnings,
    ].map((words) => h("p", { class: "note" }, words)));
    const look = async () => {
      this.isOpen = behind.open;
      if (!behind.open || parts.childElementCount) return;
      try {
        const { costSection, memorySection } = await import("./report.js");
        replace(parts, memorySection(turn.report,
          { numFrames: this.model.num_frames, open: this.actions.open }), costSection(turn.report));
      } catch (error) {
        problem(state, error);
      }
    };
    behind.addEventListener("toggle", look); // which opening it here does, too
    behind.open = this.isOpen;
  }
}

/** A file name that any system takes. */
export function fileName(session, suffix) {
  const stem = session.name.replace(/\.[^.]*$/, "").replace(/[^\p{L}\p{N}._-]+/gu, "_") || "video";
  return `${stem}_${suffix}`;
}
