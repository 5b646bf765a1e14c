// A small drawing of the room: the source's camera, the path of the next one, and earlier turns'.

import { IDENTITY } from "./camera.js";

export const calm = window.matchMedia("(prefers-reduced-motion: reduce)");
const DEPTH = 0.8; // metres; how long a drawn frustum is
const WIDE = 0.5 * (23.76 / 24) * DEPTH; // half of its end: the engine's own lens
const SUBJECT = [0, 0, 4];
const SUBJECT_RADIUS = 0.45;
const FLOOR = 1.1; // metres below the source's camera
const GLIDE = 1600; // ms that the moving camera takes along the path
const CENTRE = [0, 0.1, 1.9]; // what the drawing turns about
const DISTANCE = 11; // metres from there to the drawing's own eye
const MARGIN = 22; // pixels

const place = (pose) => [pose[3], pose[7], pose[11]];

function world(pose, x, y, z) {
  return [0, 1, 2].map(
    (row) => pose[4 * row] * x + pose[4 * row + 1] * y + pose[4 * row + 2] * z + pose[4 * row + 3],
  );
}

function colours(element) {
  const style = getComputedStyle(element);
  const read = (name) => style.getPropertyValue(name).trim();
  return Object.fromEntries(
    ["ink", "soft", "line", "accent"].map((name) => [name, read(`--${name}`)]));
}

export class Preview {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.view = { yaw: 32, pitch: 26 };
    this.path = null;
    this.others = [];
    this.aspect = 0.6;
    this.glide = null; // where the moving camera is, from 0 to 1
    new ResizeObserver(() => this.draw()).observe(canvas);
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    document.addEventListener("theme", () => this.draw());
    canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
    canvas.addEventListener("pointermove", (event) => {
      if (canvas.hasPointerCapture(event.pointerId)) this.#turn(event.movementX, event.movementY);
    });
    canvas.addEventListener("pointerenter", () => this.#play());
    canvas.addEventListener("keydown", (event) => {
      const steps = {
        ArrowLeft: [-10, 0], ArrowRight: [10, 0], ArrowUp: [0, -10], ArrowDown: [0, 10],
      };
      if (!(event.key in steps)) return;
      event.preventDefault();
      this.#turn(...steps[event.key]);
    });
  }

  /**
   * path: poses of the camera to come, or null where they are not known; others: {poses, label} of
   * earlier turns; aspect: height over width of the image; words: what the drawing shows.
   */
  show({ path, others, aspect, words }) {
    Object.assign(this, { path, others, aspect });
    this.canvas.ariaLabel = words;
    this.glide = null;
    this.draw();
    clearTimeout(this.soon);
    this.soon = setTimeout(() => this.#play(), 350);
  }

  #turn(right, down) {
    this.view.yaw = (this.view.yaw - right * 0.6) % 360;
    this.view.pitch = Math.max(-5, Math.min(85, this.view.pitch + down * 0.5));
    this.draw();
  }

  /** One glide along the path, then rest. */
  #play() {
    if (calm.matches || !this.path || this.glide !== null) return;
    const path = this.path;
    const began = performance.now();
    const step = (now) => {
      if (this.path !== path) return;
      const share = (now - began) / GLIDE;
      this.glide = share < 1 ? Math.max(0, share) : null;
      this.draw();
      if (share < 1) requestAnimationFrame(step);
    };
    this.glide = 0;
    requestAnimationFrame(step);
  }

  /** With the next frame, once for all that asked for it before. */
  draw() {
    this.due ??= requestAnimationFrame(() => {
      this.due = null;
      this.#draw();
    });
  }

  #draw() {
    const { canvas, context } = this;
    const scale = window.devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width || !height) return;
    const [columns, rows] = [Math.round(width * scale), Math.round(height * scale)];
    if (canvas.width !== columns || canvas.height !== rows) {
      Object.assign(canvas, { width: columns, height: rows });
    }
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    context.lineJoin = context.lineCap = "round";
    const paint = colours(canvas);
    this.project = this.#projection(width, height);
    this.#floor(paint);
    this.#subject(paint);
    for (const { poses, label } of this.others) {
      this.#line(poses.map(place), paint.soft, 1.25, 0.7, [3, 4]);
      this.#frustum(poses.at(-1), paint.soft, 1, 0.6);
      this.#label(poses.at(-1), label, paint.soft);
    }
    this.#frustum(IDENTITY, paint.ink, 1.5, 0.9);
    if (!this.path) return;
    this.#line(this.path.map(place), paint.accent, 2.25, 1);
    for (const share of [0.34, 0.67]) {
      this.#frustum(this.#poseAt(share), paint.accent, 1, 0.3);
    }
    this.#frustum(this.path.at(-1), paint.accent, 1.75, 1, true);
    if (this.glide !== null) {
      this.#frustum(this.#poseAt(this.glide), paint.accent, 1.75, 0.9, true);
    }
  }

  #poseAt(share) {
    return this.path[Math.round(share * (this.path.length - 1))];
  }

  /** World point -> canvas point, with everything that matters inside of it. */
  #projection(width, height) {
    const [yaw, pitch] = [this.view.yaw, this.view.pitch].map((angle) => (angle * Math.PI) / 180);
    const seen = ([x, y, z]) => {
      const [px, pz] = [x - CENTRE[0], z - CENTRE[2]];
      const across = Math.cos(yaw) * px - Math.sin(yaw) * pz;
      const along = Math.sin(yaw) * px + Math.cos(yaw) * pz;
      const py = y - CENTRE[1];
      const down = Math.cos(pitch) * py - Math.sin(pitch) * along;
      const depth = Math.max(1, Math.cos(pitch) * along + Math.sin(pitch) * py + DISTANCE);
      return [across / depth, down / depth];
    };
    const poses = [IDENTITY, ...(this.path ?? []), ...this.others.flatMap(({ poses }) => poses)];
    const subject = [-1, 1].map((side) => SUBJECT.map((value) => value + side * SUBJECT_RADIUS));
    const points = [...subject, ...poses.flatMap((pose) => this.#corners(pose))].map(seen);
    const range = (axis) => {
      const values = points.map((point) => point[axis]);
      return [Math.min(...values), Math.max(...values)];
    };
    const [[left, right], [top, bottom]] = [range(0), range(1)];
    const scale = Math.min(
      (width - 2 * MARGIN) / (right - left), (height - 2 * MARGIN) / (bottom - top));
    return (point) => {
      const [x, y] = seen(point);
      return [
        width / 2 + scale * (x - (left + right) / 2),
        height / 2 + scale * (y - (top + bottom) / 2),
      ];
    };
  }

  /** Where a frustum's image plane ends, and the eye. */
  #corners(pose) {
    const [x, y] = [WIDE, WIDE * this.aspect];
    const plane = [[-x, -y], [x, -y], [x, y], [-x, y]];
    return [...plane.map(([across, down]) => world(pose, across, down, DEPTH)), place(pose)];
  }

  #line(points, colour, width, alpha, dash = []) {
    const { context } = this;
    context.globalAlpha = alpha;
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.setLineDash(dash);
    context.beginPath();
    for (const point of points) context.lineTo(...this.project(point));
    context.stroke();
    context.setLineDash([]);
    context.globalAlpha = 1;
  }

  #frustum(pose, colour, width, alpha, isFilled = false) {
    const [x, y] = [WIDE, WIDE * this.aspect];
    const corners = this.#corners(pose);
    const eye = corners.pop();
    if (isFilled) {
      const { context } = this;
      context.globalAlpha = 0.16 * alpha;
      context.fillStyle = colour;
      context.beginPath();
      for (const corner of corners) context.lineTo(...this.project(corner));
      context.fill();
    }
    this.#line([...corners, corners[0]], colour, width, alpha);
    for (const corner of corners) this.#line([eye, corner], colour, width, alpha);
    // which side is up
    const tip = world(pose, 0, -y * 1.5, DEPTH);
    this.#line([world(pose, -x * 0.35, -y, DEPTH), tip, world(pose, x * 0.35, -y, DEPTH)],
      colour, width, alpha);
  }

  #label(pose, text, colour) {
    const { context } = this;
    const [x, y] = this.project(world(pose, 0, -WIDE, DEPTH * 1.1));
    context.fillStyle = colour;
    context.font = "600 12px system-ui, sans-serif";
    context.textAlign = "center";
    context.fillText(text, x, y - 4);
  }

  #floor(paint) {
    for (let step = -4; step <= 4; step += 1) {
      this.#line([[step, FLOOR, -2], [step, FLOOR, 6]], paint.line, 1, 0.9);
      this.#line([[-4, FLOOR, step + 2], [4, FLOOR, step + 2]], paint.line, 1, 0.9);
    }
  }

  /** A globe where arcs turn about, and its foot on the floor. */
  #subject(paint) {
    const around = Array.from({ length: 33 }, (_, index) => (index / 32) * 2 * Math.PI);
    const [x, y, z] = SUBJECT;
    const ring = (point) => this.#line(around.map(point), paint.soft, 1, 0.7);
    const r = SUBJECT_RADIUS;
    ring((a) => [x + r * Math.cos(a), y, z + r * Math.sin(a)]);
    ring((a) => [x + r * Math.cos(a), y + r * Math.sin(a), z]);
    ring((a) => [x, y + r * Math.cos(a), z + r * Math.sin(a)]);
    this.#line([[x, r, z], [x, FLOOR, z]], paint.soft, 1, 0.5, [2, 3]);
  }
}
