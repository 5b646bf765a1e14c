// The view of a model that streams: a video that plays while it is made, told another prompt on the
// way, and, of a model that edits, made of what this machine's camera sees.

import * as api from "./api.js";
import { $, h, replace } from "./dom.js";
import { announce, problem } from "./notices.js";

const KEPT = 30; // seconds of video behind the one that is shown
const BEHIND = 0.5; // seconds that the player stays behind the newest frame it has
const STATUS = 1000; // ms between two looks at the stream
const UNSENT = 4; // frames that may wait in this browser; what is more is left out

const WAITS = {
  reader: "waits for the player", source: "waits for frames", worker: "waits for a worker",
};

const streamPath = (id) => `v1/streams/${id}`;

/** Where frames go up. A WebSocket has no headers of its own, so the token is a protocol's name. */
function sourceSocket(id) {
  const address = new URL(`${streamPath(id)}/source`, api.ROOT);
  address.protocol = address.protocol.replace("http", "ws");
  const token = api.getToken();
  const name = `token.${api.hex(new TextEncoder().encode(token))}`;
  return new WebSocket(address, token ? ["mv2v", name] : ["mv2v"]);
}

/** Appends a stream's video to a player as it comes. */
class Player {
  constructor(video) {
    this.video = video;
  }

  /** Plays a response's body to its end. codec: as the stream's status has it. */
  async play(response, codec) {
    const source = new MediaSource();
    this.video.src = URL.createObjectURL(source);
    await new Promise((done) => { source.addEventListener("sourceopen", done, { once: true }); });
    URL.revokeObjectURL(this.video.src);
    const buffer = source.addSourceBuffer(`video/mp4; codecs="${codec}"`);
    const reader = response.body.getReader();
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      await appended(buffer, () => buffer.appendBuffer(value));
      await this.keepUp(buffer);
    }
    if (source.readyState === "open") source.endOfStream();
  }

  /** Shows what is new, and lets go of what is long past, so that memory does not grow. */
  async keepUp(buffer) {
    const { video } = this;
    if (!video.buffered.length) return;
    const start = video.buffered.start(0);
    const end = video.buffered.end(video.buffered.length - 1);
    if (video.currentTime < start) video.currentTime = start;
    if (video.paused && end - start >= BEHIND) video.play().catch(() => {});
    if (video.currentTime - start > 2 * KEPT) {
      await appended(buffer, () => buffer.remove(start, video.currentTime - KEPT));
    }
    // a player that is far behind takes no more for now: the service waits for it
    while (end - video.currentTime > KEPT && !video.paused) {
      await new Promise((done) => { setTimeout(done, 200); });
    }
  }
}

function appended(buffer, change) {
  return new Promise((resolve, reject) => {
    buffer.addEventListener("updateend", resolve, { once: true });
    buffer.addEventListener("error", () => reject(new Error("the browser cannot play this video")),
      { once: true });
    change();
  });
}

/** This machine's camera, each frame cut to the stream's size and sent by a WebSocket. */
class Camera {
  constructor(stream) {
    this.stream = stream;
    this.video = h("video", { muted: true, playsinline: true, class: "live-camera",
      "aria-label": "What the camera sees" });
    this.dropped = 0;
  }

  async start() {
    const { width, height, fps } = this.stream;
    this.media = await navigator.mediaDevices.getUserMedia({
      video: { width: { ideal: width }, height: { ideal: height }, frameRate: { ideal: fps } },
    });
    this.video.srcObject = this.media;
    await this.video.play();
    this.socket = sourceSocket(this.stream.id);
    this.socket.binaryType = "arraybuffer";
    await new Promise((resolve, reject) => {
      this.socket.addEventListener("open", resolve, { once: true });
      this.socket.addEventListener("close", () => reject(new Error("the service takes no frames")),
        { once: true });
    });
    const canvas = new OffscreenCanvas(width, height);
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.timer = setInterval(() => this.send(), 1000 / fps);
  }

  send() {
    const { width, height } = this.stream;
    if (this.socket.readyState !== WebSocket.OPEN) return;
    if (this.socket.bufferedAmount > UNSENT * width * height * 3) {
      this.dropped += 1;
      return;
    }
    const { videoWidth, videoHeight } = this.video;
    const scale = Math.max(width / videoWidth, height / videoHeight);
    const [w, hh] = [videoWidth * scale, videoHeight * scale];
    this.context.drawImage(this.video, (width - w) / 2, (height - hh) / 2, w, hh);
    const { data } = this.context.getImageData(0, 0, width, height);
    const rgb = new Uint8Array(width * height * 3);
    for (let at = 0, to = 0; at < data.length; at += 4) {
      rgb[to++] = data[at];
      rgb[to++] = data[at + 1];
      rgb[to++] = data[at + 2];
    }
    this.socket.send(rgb);
  }

  stop() {
    clearInterval(this.timer);
    this.socket?.close();
    for (const track of this.media?.getTracks() ?? []) track.stop();
  }
}

export class Live {
  constructor(model) {
    this.model = model;
    this.prompt = h("input", { id: "live-prompt", type: "text", name: "prompt", maxlength: 8192,
      required: true, autocomplete: "off", placeholder: "What the video shows" });
    this.go = h("button", { class: "button primary" }, "Start");
    this.end = h("button", { type: "button", class: "button", disabled: true,
      onclick: () => this.stop() }, "Stop");
    this.video = h("video", { muted: true, playsinline: true, controls: true, class: "live-video",
      "aria-label": "The stream" });
    this.video.muted = true;
    this.state = h("p", { class: "fine", role: "status" }, "Nothing is made yet.");
    this.problems = h("div", {});
    this.camera = null;
    this.cameraPlace = h("div", { class: "live-source" });
    const form = h("form", { class: "live-form", onsubmit: (event) => {
      event.preventDefault();
      this.submit();
    } }, h("label", { class: "field", for: "live-prompt" }, h("span", {}, "Prompt"), this.prompt),
    h("div", { class: "row" }, this.go, this.end));
    replace($("streams"), h("h1", {}, "Live"),
      h("div", { class: "live-stage" }, this.video, this.cameraPlace), form, this.state,
      this.problems);
    window.addEventListener("pagehide", () => this.camera?.stop());
  }

  get isLive() {
    return this.stream?.state === "running";
  }

  /** A new stream, or another prompt for the one that is made. */
  async submit() {
    replace(this.problems);
    try {
      if (this.isLive) {
        const { first_block: first } = await api.post(
          `${streamPath(this.stream.id)}/prompt`, { prompt: this.prompt.value });
        announce(`The prompt holds from block ${first} on`);
      } else {
        await this.begin();
      }
    } catch (error) {
      problem(this.problems, error);
    }
  }

  async begin() {
    this.show(await api.post("v1/streams", { prompt: this.prompt.value }, api.newKey()));
    if (this.model.stream.has_source) {
      this.camera = new Camera(this.stream);
      replace(this.cameraPlace, this.camera.video);
      try {
        await this.camera.start();
      } catch (error) {
        await this.stop();
        throw error;
      }
    }
    this.watch(this.stream.id);
    this.play(this.stream.id).catch((error) => problem(this.problems, error));
  }

  async play(id) {
    const response = await api.send(`${streamPath(id)}/video?first=1`);
    let status;
    do {
      status = await api.json(streamPath(id));
      if (!status.codec) await new Promise((done) => { setTimeout(done, 100); });
    } while (!status.codec && status.state === "running");
    if (status.codec) await new Player(this.video).play(response, status.codec);
  }

  async watch(id) {
    while (this.isLive && this.stream.id === id) {
      await new Promise((done) => { setTimeout(done, STATUS); });
      try {
        const now = await api.json(streamPath(id));
        if (this.stream.id === id) this.show(now);
      } catch (error) {
        if (error.code === "not_found") return;
      }
    }
  }

  async stop() {
    this.camera?.stop();
    this.camera = null;
    replace(this.cameraPlace);
    try {
      if (this.stream) this.show(await api.post(`${streamPath(this.stream.id)}/cancel`, {}));
    } catch (error) {
      problem(this.problems, error);
    }
  }

  show(stream) {
    this.stream = stream;
    const live = stream.state === "running";
    this.go.textContent = live ? "Change prompt" : "Start";
    this.end.disabled = !live;
    const rate = stream.latency && `${stream.latency.frames_per_second.toFixed(1)} frames a second`;
    const words = [
      live ? WAITS[stream.waits_for] ?? "being made" : stream.error?.message ?? stream.state,
      `${stream.seconds.toFixed(1)} s of video`,
      rate,
      this.camera?.dropped ? `${this.camera.dropped} frames of the camera left out` : null,
    ];
    this.state.textContent = words.filter(Boolean).join(" · ");
  }
}
