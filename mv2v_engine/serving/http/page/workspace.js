// One session on the page: its cards, its player, the turns under way, and the next one.

import * as api from "./api.js";
import { sourceCard, turnCard } from "./cards.js";
import { Composer } from "./composer.js";
import { $, h, replace } from "./dom.js";
import { bytes, plural } from "./format.js";
import { button, clear, problem } from "./notices.js";
import { Player } from "./player.js";
import { JobCard } from "./progress.js";

export class Workspace {
  /**
   * model: as the service describes it. onview: ({frame, hidden}) of the session that is shown has
   * changed; onbranch: (session) made from this one; onchange: () something that the list shows;
   * ondelete: (session) asks whether to, and does it.
   */
  constructor(model, { onview, onbranch, onchange, ondelete }) {
    Object.assign(this, { model, onview, onbranch, onchange, ondelete });
    this.root = $("session");
    this.wall = $("wall");
    this.player = new Player($("transport"), () => this.#viewed());
    this.composer = new Composer($("composer"), model, (session, job) => {
      if (this.session?.id === session.id) this.#addJob(job);
    });
    this.cards = new Map();
    this.jobs = new Map();
    this.hidden = new Set();
    this.session = null;
    this.opening = 0;
  }

  /** Shows a session as it is now. view: {frame, hidden}, where the user left it. */
  async open(id, view) {
    this.close();
    const opening = this.opening;
    // jobs first: one that is finished by then is among the turns that are asked for after it
    const jobs = await api.jobs(id);
    const [session, turns] = await Promise.all([api.session(id), api.turns(id)]);
    if (opening !== this.opening) return;
    this.root.inert = false;
    this.session = session;
    this.turns = turns;
    this.hidden = new Set(view.hidden);
    this.#head();
    const length = this.model.kind === "views" ? this.model.num_frames : session.frames;
    this.player.setTimeline(session.fps, Math.min(length, session.frames));
    this.#addCard(sourceCard(session, this.#settings()));
    for (const turn of turns) this.#addCard(turnCard(session, turn, this.#settings()));
    this.#chips();
    this.composer.show(session, turns);
    this.player.seek(view.frame);
    const newest = turns.at(-1)?.created ?? 0;
    const isOpen = (job) => job.state === "queued" || job.state === "running"
      || (job.state === "failed" && job.ended > newest);
    for (const job of jobs.filter(isOpen).sort((a, b) => a.created - b.created)) this.#addJob(job);
  }

  /** Also ends an `open` that still waits. Nothing of the session can be pressed any more. */
  close() {
    this.opening += 1;
    this.session = null; // first, so that the player's last frame is nobody's view
    this.root.inert = true;
    this.player.clear();
    for (const card of [...this.cards.values(), ...this.jobs.values()]) card.remove();
    this.cards.clear();
    this.jobs.clear();
    for (const id of ["session-head", "session-state", "shown", "wall"]) clear($(id));
  }

  #settings() {
    const { session, model } = this;
    return {
      player: this.player,
      aspect: this.#aspect(),
      numFrames: model.num_frames,
      open: (turn) => this.#reveal(String(turn)),
      onbranch: async (turn) => this.onbranch(await api.branch(session.id, turn)),
    };
  }

  /** Width over height, of the turns: views have the model's size, edits the source's. */
  #aspect() {
    if (this.model.kind === "edits") return this.session.width / this.session.height;
    const [height, width] = this.model.size;
    return width / height;
  }

  #head() {
    const { session } = this;
    const { footprint } = session;
    const next = footprint.next_turn_tokens;
    const tokens = next && Object.values(next).reduce((a, b) => a + b, 0);
    const facts = [
      `${session.width} × ${session.height}`, plural(session.frames, "frame"),
      `${Number(session.fps.toFixed(3))} fps`, plural(session.num_turns, "turn"),
      `${bytes(footprint.disk_bytes)} on disk`,
      footprint.memory_bytes > 0 && `${bytes(footprint.memory_bytes)} in memory`,
      tokens && `next turn ${plural(tokens, "token")}`,
    ].filter(Boolean);
    const act = (name, label, action) => {
      const pressed = button(label, () => this.#attempt(pressed, action), name);
      return pressed;
    };
    replace($("session-head"),
      h("div", null, h("h1", { id: "session-name" }, session.name || "Untitled"),
        h("p", { class: "fine facts-line" }, facts.map((fact) => h("span", null, fact)))),
      h("div", { class: "row tools" },
        act("download", "Export", () =>
          api.download(api.exportPath(session.id), `${session.name || "session"}.zip`)),
        act("trash", "Delete", () => this.ondelete(session))));
  }

  async #attempt(pressed, action) {
    const place = $("session-state");
    clear(place);
    pressed.disabled = true;
    try {
      await action();
    } catch (error) {
      problem(place, error, () => this.#attempt(pressed, action));
    } finally {
      pressed.disabled = false;
    }
  }

  /** Before the cards of later turns and of turns to come. */
  #addCard(card) {
    const later = [...this.cards.values()].find(({ id }) => Number(id) > Number(card.id))
      ?? this.jobs.values().next().value;
    this.wall.insertBefore(card.element, later?.element ?? null);
    this.cards.set(card.id, card);
    card.setShown(!this.hidden.has(card.id));
  }

  #chips() {
    const ids = ["source", ...this.turns.map(({ number }) => String(number))];
    replace($("shown"), ids.map((id) => h("button", {
      type: "button", class: "chip small", "data-show": id, "aria-pressed": !this.hidden.has(id),
      onclick: () => this.#toggle(id),
    }, id === "source" ? "Source" : `Turn ${id}`)));
  }

  #toggle(id) {
    if (this.hidden.has(id)) this.hidden.delete(id);
    else if (this.hidden.size < this.cards.size - 1) this.hidden.add(id);
    this.cards.get(id).setShown(!this.hidden.has(id));
    this.#chips();
    $("shown").querySelector(`[data-show="${id}"]`).focus();
    this.#viewed();
  }

  #reveal(id) {
    const card = this.cards.get(id);
    if (!card) return;
    if (this.hidden.has(id)) this.#toggle(id);
    card.element.focus({ preventScroll: true });
    card.element.scrollIntoView({ block: "nearest", inline: "center" });
  }

  #viewed() {
    if (this.session && !this.player.isPlaying) {
      this.onview({ frame: this.player.frame, hidden: [...this.hidden] });
    }
  }

  #addJob(job) {
    this.#putAway(job.id);
    const { session } = this;
    const card = new JobCard(job, {
      onfinished: (number) => this.#finished(session, job.id, number),
      onagain: (request) => {
        this.#putAway(job.id);
        this.composer.send(request);
      },
      ongone: () => this.#putAway(job.id),
    });
    this.jobs.set(job.id, card);
    this.wall.append(card.element);
    card.begin();
    card.element.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  #putAway(id) {
    this.jobs.get(id)?.remove();
    this.jobs.delete(id);
  }

  /** The finished turn takes its job's place. */
  async #finished(session, jobId, number) {
    const place = this.jobs.get(jobId);
    try {
      const [turn, fresh] = await Promise.all([
        api.turn(session.id, number), api.session(session.id)]);
      if (this.session?.id !== session.id) return;
      // the answers about two turns may come in any order
      if (fresh.num_turns >= this.session.num_turns) this.session = fresh;
      this.#putAway(jobId);
      if (!this.cards.has(String(number))) {
        this.turns = [...this.turns, turn].sort((a, b) => a.number - b.number);
        this.#addCard(turnCard(fresh, turn, this.#settings()));
      }
      this.#head();
      this.#chips();
      this.composer.show(this.session, this.turns);
      this.onchange();
    } catch (error) {
      if (this.session?.id !== session.id) return;
      problem(place.state, error, () => this.#finished(session, jobId, number));
    }
  }

  redraw() {
    this.composer.redraw();
  }
}
