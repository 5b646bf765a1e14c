// One session on the page: its stage, its history, the turns under way, and the next one.

import * as api from "./api.js";
import { Clips } from "./clips.js";
import { Composer } from "./composer.js";
import { requestWords } from "./camera.js";
import { $, partsOf, replace } from "./dom.js";
import { bytes, plural } from "./format.js";
import { calm } from "./frustum.js";
import { History } from "./history.js";
import { Job } from "./jobs.js";
import { announce, problem } from "./notices.js";
import { PartPicker } from "./part.js";
import { sourceTiming } from "./player.js";
import { Shown, attemptable, editable, fileName, setSaved } from "./shown.js";
import { Stage } from "./stage.js";

const isAlive = ({ state }) => state === "queued" || state === "running";

export class Workspace {
  /**
   * model: as the service describes it. onview: () what is shown is another; onbranch: (session)
   * made from this one; onchange: () something that the list shows; ondelete: (session) asks
   * whether to, and does it; confirmed: ({title, words, yes}) asks.
   */
  constructor(model, { onview, onbranch, onchange, ondelete, confirmed }) {
    Object.assign(this, { model, onview, onbranch, onchange, confirmed });
    this.root = $("session");
    this.session = null;
    this.turns = [];
    this.jobs = new Map();
    this.picked = []; // ids on the stage: what is shown, and what stands beside it
    this.opening = 0;
    this.stage = new Stage($("viewer"), {
      onframe: () => this.#viewed(), oncompare: (id) => this.compare(id),
      onmode: () => this.#viewed(),
    });
    this.player = this.stage.player;
    this.clips = new Clips((id, error, again) => this.#troubled(id, error, again));
    this.history = new History(this.clips, (id, isBeside) => {
      if (isBeside) this.compare(id);
      else this.pick(id);
    });
    this.shown = new Shown(model, {
      open: (number) => this.pick(String(number)),
      branch: async (number) => onbranch(await api.branch(this.session.id, number)),
      edit: (turn, changes) => this.#editTurn(turn, changes),
      remove: (turn) => this.#removeTurn(turn),
    });
    this.part = new PartPicker(model.num_frames, {
      onlook: (frame) => this.#look(frame), onuse: (window) => this.#usePart(window),
    });
    const [head, state] = [$("session-head"), $("session-state")];
    editable(head, (changes) => this.#editSession(changes), state);
    attemptable(head, {
      star: () => this.#editSession({ is_favourite: !this.session.is_favourite }),
      download: () => api.download(
        api.exportPath(this.session.id), fileName(this.session, "all.zip")),
      remove: () => ondelete(this.session),
    }, state);
    this.composer = new Composer($("composer"), model, this.player, (session, job) => {
      if (this.session?.id === session.id) this.#addJob(job);
    });
  }

  /**
   * Shows a session as it is now. view: {show, beside, mode, frame}, where the user left it; known:
   * what was read of one just now.
   */
  async open(id, view, known) {
    this.close();
    const opening = this.opening;
    const { session, turns, jobs } = known?.session.id === id ? known : await api.whole(id);
    if (opening !== this.opening) return;
    this.root.inert = false;
    this.session = session;
    this.turns = turns;
    this.#head();
    const [width, height] = this.#size();
    this.stage.setSize(width, height);
    const length = session.source_frames?.length ?? session.frames;
    this.player.setTimeline(session.fps, length);
    this.part.show(session);
    this.composer.show(session, turns);
    const newest = turns.at(-1)?.created ?? 0;
    const isOpen = (job) => isAlive(job) || (job.state === "failed" && job.ended > newest);
    this.stage.setMode(view.mode);
    const open = jobs.filter(isOpen);
    this.#place([view.show, view.beside].filter((one) => this.#has(one)));
    for (const job of open) this.#addJob(job, false);
    if (!this.picked.length) {
      this.#place([open.at(-1)?.id ?? this.newest]);
    }
    if (view.frame) this.player.seek(view.frame);
    else this.#present();
  }

  /** Takes in what another tab has made, changed or deleted meanwhile. */
  async refresh() {
    const { session: before, turns: known } = this;
    if (!before) return;
    try {
      const { session, turns, jobs } = await api.whole(before.id);
      // what came meanwhile may be newer than this, or older
      if (this.session !== before || this.turns !== known) return this.refresh();
      Object.assign(this, { session, turns });
      this.#head();
      this.composer.show(session, turns);
      const unknown = jobs.filter((job) => isAlive(job) && !this.jobs.has(job.id));
      for (const job of unknown) this.#addJob(job, false);
      const still = this.picked.filter((id) => this.#has(id));
      if (still.length < this.picked.length) this.#place(still.length ? still : [this.newest]);
      else this.#refresh();
    } catch (error) {
      if (this.session === before) problem($("session-state"), error, () => this.refresh());
    }
  }

  /** Also ends an `open` that still waits. Nothing of the session can be pressed any more. */
  close() {
    this.opening += 1;
    this.session = null; // first, so that the player's last frame is nobody's view
    this.root.inert = true;
    $("session-form").reset(); // what was not saved of it
    this.player.clear();
    for (const job of this.jobs.values()) job.remove();
    this.jobs.clear();
    this.picked = [];
    this.stage.show();
    this.clips.clear();
    this.history.clear();
    this.shown.clear();
    replace($("session-state"));
    replace(this.stage.state);
  }

  /** Width and height of the turns: views have the session's size, edits the source's. */
  #size() {
    const { session, model } = this;
    if (model.kind === "edits") return [session.width, session.height];
    return session.size ? session.size.split("x").map(Number) : [...model.size].reverse();
  }

  get ids() {
    return ["source", ...this.turns.map(({ number }) => String(number)), ...this.jobs.keys()];
  }

  get turn() {
    return this.turns.find(({ number }) => String(number) === this.picked[0]);
  }

  /** The id of what was made last. */
  get newest() {
    return String(this.turns.at(-1)?.number ?? "source");
  }

  #has(id) {
    return Boolean(id) && this.ids.includes(id);
  }

  #head() {
    const { session } = this;
    const { facts, star } = partsOf($("session-head"));
    for (const field of $("session-head").querySelectorAll("[data-field]")) {
      setSaved(field, session[field.dataset.field]);
    }
    $("session-heading").textContent = session.name || "Untitled";
    star.ariaPressed = session.is_favourite;
    facts.textContent = [
      `${session.width} × ${session.height}`, plural(session.frames, "frame"),
      `${Number(session.fps.toFixed(3))} frames a second`,
      `${bytes(session.footprint.disk_bytes)} on disk`,
    ].join(" · ");
  }

  async #editSession(changes) {
    const { session } = this;
    const fresh = await this.#edited(changes, session, (based) =>
      api.editSession(session.id, based), () => api.session(session.id));
    if (this.session?.id !== session.id) return;
    this.session = { ...this.session, ...fresh };
    this.#head();
    this.onchange();
  }

  /** Changes a record; where somebody else was faster, the next try is based on what they wrote. */
  async #edited(changes, record, change, read) {
    try {
      return await change({ ...changes, edited: record.edited });
    } catch (error) {
      if (error.code === "edit_conflict") record.edited = (await read()).edited;
      throw error;
    }
  }

  async #editTurn(turn, changes) {
    const { session } = this;
    const fresh = await this.#edited(changes, turn, (based) =>
      api.editTurn(session.id, turn.number, based), () => api.turn(session.id, turn.number));
    if (this.session?.id !== session.id) return;
    this.turns = this.turns.map((known) => (known.number === fresh.number ? fresh : known));
    this.#refresh();
  }

  async #removeTurn(turn) {
    const { session } = this;
    const dependents = this.turns.filter(({ report }) => !report.windows
      && report.memory.retrieved.some((row) => row.turn === turn.number));
    const isSure = await this.confirmed({
      title: `Delete turn ${turn.number}?`,
      words: `Its video goes, and later turns will not remember it. ${dependents.length
        ? `What remembered it stays as it is: ${plural(dependents.length, "turn")}.` : ""}`,
      yes: "Delete it",
    });
    if (!isSure) return;
    const gone = await api.removeTurn(session.id, turn.number);
    if (this.session?.id !== session.id) return;
    announce(`Turn ${turn.number} is deleted`);
    this.turns = this.turns.filter(({ number }) => number !== turn.number).map((other) =>
      (gone.dependents.includes(other.number)
        ? { ...other, forgotten: [...new Set([...other.forgotten, turn.number])] } : other));
    const id = String(turn.number);
    this.picked = this.picked.filter((one) => one !== id);
    if (!this.picked.length) this.picked = [this.newest];
    this.#place(this.picked);
    this.clips.remove(id);
    this.composer.show(this.session, this.turns);
    this.history.focus();
    this.onchange();
  }

  /** Shows something on the stage. */
  pick(id) {
    if (!this.#has(id)) return;
    this.#place([id, ...this.picked.slice(1).filter((one) => one !== id)]);
    this.#viewed();
    this.#present();
  }

  /** What stands beside what is shown; null for nothing. */
  compare(id) {
    const [first] = this.picked;
    this.#place(id && id !== first && this.#has(id) ? [first, id] : [first]);
    this.#viewed();
  }

  /** The next or the one before of all that there is. */
  move(steps) {
    const { ids } = this;
    const place = ids.indexOf(this.picked[0]) + steps;
    this.pick(ids[(place + ids.length) % ids.length]);
  }

  #place(ids) {
    this.picked = ids;
    if (!ids.length) return;
    if (this.jobs.has(ids[0])) this.player.pause();
    this.stage.show(...ids.map((id) => this.#entry(id)));
    replace(this.stage.state);
    this.#refresh();
  }

  #entry(id) {
    const { session } = this;
    const job = this.jobs.get(id);
    if (job) return { id, title: "Under way", element: job.element };
    if (id !== "source") {
      const picture = api.thumbnailPath(session.id, id);
      const video = this.clips.get(id, api.videoPath(session.id, id), `Turn ${id}`, picture);
      return { id, title: `Turn ${id}`, video, under: api.begunPicture(picture) };
    }
    const video = this.#source();
    const frames = session.source_frames ?? Array.from({ length: session.frames }, (_, i) => i);
    return {
      id, title: "Source", video, isCover: session.fit !== "letterbox",
      timing: sourceTiming(video, session.frames, frames, session.fps),
    };
  }

  #source() {
    return this.clips.get("source", api.sourcePath(this.session.id), "Source");
  }

  /** What is shown plays by itself; who wants calm gets its middle, where cameras differ. */
  #present() {
    if (this.jobs.has(this.picked[0])) return;
    if (calm.matches) this.player.seek(Math.floor(this.player.frames / 2));
    else this.player.play();
  }

  /** All that tells of the session's turns. */
  #refresh() {
    const { session, turns, picked } = this;
    this.#refreshHistory();
    const choices = [["source", "Source"], ...turns.map(({ number, name, request }) =>
      [String(number), `Turn ${number}: ${name || requestWords(request)}`])];
    this.stage.setChoices(choices.filter(([id]) => id !== picked[0]), picked[1]);
    const { turn } = this;
    if (turn) this.shown.show(session, turn);
    else if (picked[0] === "source") this.shown.showSource(session);
    else this.shown.clear();
  }

  #troubled(id, error, again) {
    if (!this.picked.includes(id)) return;
    if (error) problem(this.stage.state, error, again);
    else replace(this.stage.state);
  }

  #viewed() {
    if (this.session && !this.player.isPlaying) this.onview();
  }

  /** What the address says of the view. */
  get view() {
    const [show, beside] = this.picked;
    return { show, beside, mode: this.stage.mode, frame: this.player.frame };
  }

  /** A frame of the upload itself, while its part is picked. */
  #look(frame) {
    if (this.picked[0] !== "source" || this.picked.length > 1) this.#place(["source"]);
    this.player.pause();
    const { session } = this;
    const video = this.#source();
    const seek = () => { video.currentTime = ((frame + 0.5) * video.duration) / session.frames; };
    // before that it has no duration; of several that wait, the last one holds
    if (video.readyState >= HTMLMediaElement.HAVE_METADATA) seek();
    else video.addEventListener("loadedmetadata", seek, { once: true });
  }

  async #usePart(window) {
    const { session } = this;
    const made = await api.branch(session.id, 0, window);
    // it was only begun with another part
    if (!this.turns.length && !this.jobs.size) await api.remove(session.id);
    await this.onbranch(made);
  }

  #addJob(job, isShown = true) {
    this.#putAway(job.id, false);
    const { session } = this;
    const made = new Job(job, {
      onfinished: (number) => this.#finished(session, job.id, number),
      onagain: (request) => {
        this.#putAway(job.id);
        this.composer.send([request]);
      },
      ongone: () => this.#putAway(job.id),
      onchange: () => {
        if (this.jobs.has(job.id)) this.#refreshHistory();
      },
    });
    this.jobs.set(job.id, made);
    // of several that were asked for at once, the first one is watched
    if (isShown && !this.jobs.has(this.picked[0])) this.#place([job.id]);
    else this.#refreshHistory();
    made.begin();
  }

  #refreshHistory() {
    this.history.show(this.session, this.turns, [...this.jobs.values()], this.picked);
  }

  #putAway(id, shows = true) {
    const job = this.jobs.get(id);
    if (!job) return;
    const hadFocus = job.element.contains(document.activeElement);
    this.jobs.delete(id);
    if (shows && this.picked.includes(id)) {
      this.#place([[...this.jobs.keys()][0] ?? this.newest]);
      if (hadFocus) this.history.focus();
    }
    job.remove();
    if (shows) this.#refreshHistory();
  }

  /** The finished turn takes its job's place, and plays. */
  async #finished(session, jobId, number) {
    const job = this.jobs.get(jobId);
    try {
      const [turn, fresh] = await Promise.all([
        api.turn(session.id, number), api.session(session.id)]);
      if (this.session?.id !== session.id) return;
      // the answers about two turns may come in any order
      if (fresh.num_turns >= this.session.num_turns) this.session = fresh;
      const wasShown = this.picked[0] === jobId;
      const hadFocus = job.element.contains(document.activeElement);
      this.clips.remove(String(number)); // an edit that is made again
      this.turns = [...this.turns.filter((known) => known.number !== number), turn]
        .sort((a, b) => a.number - b.number);
      this.jobs.delete(jobId);
      if (wasShown) {
        this.#place([String(number)]);
        this.#present();
      } else this.#refresh();
      job.remove();
      if (hadFocus) this.history.focus();
      this.composer.show(this.session, this.turns);
      this.onchange();
    } catch (error) {
      if (this.session?.id !== session.id || !this.jobs.has(jobId)) return;
      problem(job.state, error, () => this.#finished(session, jobId, number));
    }
  }
}
