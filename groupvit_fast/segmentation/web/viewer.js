"use strict";
// The viewer of one segmented photo: picture with a pointer, opacity, views, and the list of what is in it.

const PHOTO = "photo", CLASSES = "classes"; // other views are the number of a grouping stage
const STEP = 1 / 40; // of the picture, for the arrow keys

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key.startsWith("aria-")) node.setAttribute(key, value);
    else if (value !== false && value !== null) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

function percent(share) {
  return share > 0 && share < 0.001 ? "< 0.1 %" : `${(share * 100).toFixed(1)} %`;
}

function thumbnail(url, name, action) {
  const picture = element("img", { src: url, alt: "", loading: "lazy" });
  return element("button", { type: "button", title: name, "aria-label": name, onclick: action }, picture);
}

/** Follows the system until it is clicked. */
function themeButton(button) {
  button.addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
}

class Viewer {
  constructor(root) {
    this.hidden = new Set(); // names of classes that are switched off; kept from photo to photo
    this.view = CLASSES;
    this.focus = null; // label under the pointer in the list
    this.heat = null; // final group whose soft map is shown
    this.photo = this.labels = this.painter = null;
    this.canvas = element("canvas", { tabindex: 0, role: "img", "aria-describedby": "reading" });
    this.cross = element("span", { class: "cross", hidden: true });
    this.tip = element("div", { class: "tip", hidden: true });
    this.views = element("div", { class: "views", role: "group", "aria-label": "View" });
    this.slider = element("input", { type: "range", min: 0, max: 100, value: 62, id: "opacity" });
    this.opacityText = element("output", { for: "opacity" }, "62 %");
    this.reading = element("p", { class: "reading", id: "reading", "aria-live": "polite" });
    this.side = element("div", { class: "list" });
    const opacity = element("label", { class: "opacity" }, "Opacity", this.slider, this.opacityText);
    const frame = element("div", { class: "frame" }, this.canvas, this.cross, this.tip);
    this.stage = element(
      "section", { class: "stage", "aria-label": "Picture" },
      element("div", { class: "tools" }, this.views, opacity), frame, this.reading,
    );
    this.panel = element("section", { class: "panel", "aria-label": "Contents" }, this.side);
    root.append(this.stage, this.panel);
    this.listen();
  }

  listen() {
    this.slider.addEventListener("input", () => {
      this.opacityText.textContent = `${this.slider.value} %`;
      this.redraw();
    });
    this.canvas.addEventListener("pointermove", (event) => this.pointAt(event));
    this.canvas.addEventListener("pointerdown", (event) => this.pointAt(event));
    this.canvas.addEventListener("pointerleave", () => this.leave());
    this.canvas.addEventListener("blur", () => this.leave());
    this.canvas.addEventListener("keydown", (event) => this.moveByKey(event));
    this.canvas.addEventListener("click", () => this.choose());
  }

  // ---- what is shown

  /** The part of a result that does not depend on class names; `showLabels` follows. False: overtaken. */
  async showPhoto(photo) {
    const turn = (this.turn = (this.turn || 0) + 1);
    const [image, heat, ...groups] = await Promise.all(
      [loadImage(photo.picture), unpack(photo.heat), ...photo.stages.map((stage) => unpack(stage.groups))],
    );
    if (turn !== this.turn) return false;
    const stages = photo.stages.map((stage, index) => ({
      ...stage, map: groups[index].values, colours: stage.colours.map(channels), names: stage.colours,
    }));
    this.photo = { ...photo, stages, heat };
    this.labels = null;
    this.painter = new Painter(this.canvas, image, photo.shown);
    this.canvas.setAttribute("aria-label", `${photo.name}, ${photo.width} x ${photo.height} pixels`);
    if (typeof this.view === "number" && this.view >= stages.length) this.view = CLASSES;
    this.heat = null;
    this.leave();
    return true;
  }

  async showLabels(labels) {
    const { photo } = this;
    const [map, scores] = await Promise.all([unpack(labels.labels), unpack(labels.scores)]);
    if (photo !== this.photo) return;
    const colours = labels.classes.map((item) => channels(item.colour));
    this.labels = { ...labels, map: map.values, scoreMap: scores.values, colours };
    this.showViews();
    this.refresh();
  }

  showViews() {
    const titles = [[CLASSES, "Classes"], ...this.photo.stages.map((stage, index) => [index, stage.title])];
    const buttons = [...titles, [PHOTO, "Photo"]].map(([view, title]) => element(
      "button", { type: "button", "aria-pressed": view === this.view, onclick: () => this.setView(view) }, title,
    ));
    this.views.replaceChildren(...buttons);
  }

  setView(view) {
    this.view = view;
    this.heat = this.focus = null;
    this.leave();
    [...this.views.children].forEach((button, index, all) => {
      const own = index === 0 ? CLASSES : index === all.length - 1 ? PHOTO : index - 1;
      button.setAttribute("aria-pressed", own === view);
    });
    this.refresh();
  }

  refresh() {
    this.side.replaceChildren(...(typeof this.view === "number" ? groupList(this) : classList(this)));
    this.redraw();
  }

  redraw() {
    if (this.pending) return;
    this.pending = requestAnimationFrame(() => {
      this.pending = null;
      if (this.labels) this.draw();
    });
  }

  draw() {
    const opacity = this.view === PHOTO ? 0 : this.slider.value / 100;
    if (this.heat !== null) {
      const { heat, boxes } = this.photo;
      const [, groups, ...size] = heat.shape, length = size[0] * size[1];
      const values = heat.values.subarray(this.heat * length, (this.heat + 1) * length);
      this.painter.paintHeat(values, size, boxes[Math.floor(this.heat / groups)], Math.min(1, 0.2 + opacity));
      return;
    }
    const dim = (label) => (this.focus === null || this.focus === label ? 1 : 0.25);
    if (typeof this.view === "number") {
      const { map, colours } = this.photo.stages[this.view];
      this.painter.paint(map, colours, dim, opacity);
    } else {
      const { map, colours } = this.labels;
      this.painter.paint(map, colours, (label) => (this.visible(label) ? dim(label) : 0), opacity);
    }
  }

  visible(label) {
    return label !== this.labels.background && !this.hidden.has(this.labels.classes[label].name);
  }

  /** Emphasise one label of the current view while it is pointed at in the list; null: none. */
  emphasise(label) {
    if (this.focus === label) return;
    this.focus = label;
    this.redraw();
  }

  // ---- the pointer

  pointAt(event) {
    const box = this.canvas.getBoundingClientRect();
    this.cross.hidden = true;
    this.read((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  }

  moveByKey(event) {
    const [right, down] = {
      ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1],
    }[event.key] || [0, 0];
    if (event.key === "Enter" || event.key === " ") this.choose();
    else if (event.key === "Escape") return this.leave();
    else if (!right && !down) return;
    event.preventDefault();
    const [x, y] = this.at || [0.5, 0.5];
    const clamp = (value) => Math.min(0.9999, Math.max(0, value));
    this.read(clamp(x + right * STEP), clamp(y + down * STEP));
    this.cross.hidden = false;
    this.cross.style.left = `${this.at[0] * 100}%`;
    this.cross.style.top = `${this.at[1] * 100}%`;
  }

  leave() {
    this.at = null;
    this.tip.hidden = this.cross.hidden = true;
    this.reading.textContent = this.heat === null
      ? "Point at the picture, or focus it and use the arrow keys, to read class and score."
      : `Soft map of group ${this.heat + 1}: the brighter, the more it claims the place.`;
    mark(this.side, null);
  }

  /** Show what lies at (x, y), both 0..1. */
  read(x, y) {
    if (!this.labels) return;
    const { columns, rows } = this.painter;
    const column = Math.min(columns - 1, Math.max(0, Math.floor(x * columns)));
    const row = Math.min(rows - 1, Math.max(0, Math.floor(y * rows)));
    this.at = [x, y];
    const found = describe(this, row * columns + column);
    this.tip.replaceChildren(...found.nodes);
    this.tip.hidden = false;
    this.tip.classList.toggle("left", x > 0.6);
    this.tip.classList.toggle("above", y > 0.6);
    this.tip.style.left = `${x * 100}%`;
    this.tip.style.top = `${y * 100}%`;
    this.reading.textContent = found.text;
    mark(this.side, found.label);
  }

  /** A click or Enter on the picture: in the final groups, the soft map of the group there. */
  choose() {
    const stages = this.photo?.stages;
    if (!this.at || !stages || this.view !== stages.length - 1) return;
    const { columns, rows } = this.painter;
    const place = Math.floor(this.at[1] * rows) * columns + Math.floor(this.at[0] * columns);
    this.showHeat(stages.at(-1).map[place]);
  }

  showHeat(group) {
    this.heat = this.heat === group ? null : group;
    this.focus = null;
    if (!this.at) this.leave();
    this.refresh();
  }
}
