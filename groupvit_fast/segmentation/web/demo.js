"use strict";
// The demo: photos go to the server once, then every edit of the class list asks for labels alone.

const PAUSE = 180; // milliseconds without a key before a class list is sent

class Demo {
  constructor(info) {
    this.info = info;
    this.viewer = new Viewer(document.getElementById("viewer"));
    this.strip = document.getElementById("photos");
    this.alert = document.getElementById("alert");
    this.current = null; // {blob, name, id}
    this.editor();
    this.viewer.panel.prepend(this.form);
    document.getElementById("facts").textContent = info.facts.join(" · ");
    themeButton(document.getElementById("theme"));
    this.listen();
  }

  editor() {
    this.text = element("textarea", { id: "classes", spellcheck: "false", "aria-describedby": "status hint" });
    this.text.value = this.info.classes;
    const lists = Object.keys(this.info.vocabularies).map((name) => element("option", { value: name }, name));
    this.choice = element("select", { "aria-label": "Take a list of classes" }, element("option", { value: "" }, "lists…"), ...lists);
    this.background = element("input", { type: "checkbox", id: "background" });
    this.threshold = element("input", { type: "range", min: 0, max: 100, value: 50, "aria-label": "Background below this score", disabled: true });
    this.limit = element("span", { class: "number" }, "0.50");
    this.status = element("p", { class: "status", id: "status", role: "status" });
    const title = element("div", { class: "title" }, element("label", { for: "classes" }, "Classes to look for"), this.choice);
    const background = element("label", { class: "line" }, this.background, "Background below");
    this.form = element(
      "div", { class: "editor" }, title, this.text,
      element("p", { class: "note", id: "hint" }, "Any words, between commas; sofa|couch are two names of one class."),
      element("div", { class: "line" }, background, this.threshold, this.limit), this.status,
    );
  }

  listen() {
    this.text.addEventListener("input", () => this.soon());
    this.choice.addEventListener("change", () => {
      if (this.choice.value) this.text.value = this.info.vocabularies[this.choice.value];
      this.choice.value = "";
      this.soon(0);
    });
    this.background.addEventListener("change", () => {
      this.threshold.disabled = !this.background.checked;
      this.soon(0);
    });
    this.threshold.addEventListener("input", () => {
      this.limit.textContent = (this.threshold.value / 100).toFixed(2);
      this.soon(40);
    });
    const file = document.getElementById("file"), open = document.getElementById("open");
    file.addEventListener("change", () => {
      if (file.files.length) this.open(file.files[0]);
      file.value = "";
    });
    open.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      file.click();
    });
    document.addEventListener("paste", (event) => {
      const [picture] = event.clipboardData.files;
      if (picture) this.open(picture);
    });
    this.listenToDrops(document.getElementById("drop"));
  }

  listenToDrops(veil) {
    let depth = 0;
    const show = (change) => {
      depth = change ? depth + change : 0;
      veil.hidden = depth <= 0;
    };
    const files = (event) => [...event.dataTransfer.types].includes("Files");
    addEventListener("dragenter", (event) => files(event) && show(1));
    addEventListener("dragleave", (event) => files(event) && show(-1));
    addEventListener("dragover", (event) => event.preventDefault());
    addEventListener("drop", (event) => {
      event.preventDefault();
      show(0);
      if (event.dataTransfer.files.length) this.open(event.dataTransfer.files[0]);
    });
  }

  // ---- photos

  /** A file of the visitor: its own place in the strip once the server took it. */
  async open(file) {
    if (file.size > this.info.most_bytes) {
      return this.complain(`${file.name}: ${Math.round(file.size / 2 ** 20)} MB; at most ${this.info.most_bytes / 2 ** 20} MB are taken.`);
    }
    const photo = { blob: file, name: file.name || "pasted picture" };
    if (await this.show(photo)) this.place(photo, this.strip.children[1]);
  }

  /** Put a photo into the strip, before `next`. */
  place(photo, next = null) {
    photo.button = thumbnail(photo.url || photo.picture, photo.name, () => this.show(photo));
    this.strip.insertBefore(photo.button, next);
    this.press();
  }

  press() {
    for (const button of this.strip.querySelectorAll("button")) {
      button.setAttribute("aria-pressed", button === this.current?.button);
    }
  }

  async show(photo) {
    const before = this.current;
    this.current = photo;
    this.press();
    const shown = await this.attempt(async () => {
      if (!photo.blob) photo.blob = await (await ask(photo.url)).blob();
      const part = await (await ask("/api/photos", { method: "POST", body: photo.blob, headers: { "Content-Type": "application/octet-stream" } })).json();
      Object.assign(photo, { id: part.id, picture: part.picture });
      if (this.current !== photo || !(await this.viewer.showPhoto({ ...part, name: photo.name }))) return false;
      await this.segment();
      return true;
    }, `${photo.name}: `);
    if (shown === undefined && this.current === photo) {
      this.current = before;
      this.press();
    }
    return Boolean(shown);
  }

  // ---- labels

  soon(pause = PAUSE) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.attempt(() => this.segment()), pause);
  }

  async segment(again = true) {
    const photo = this.current;
    if (!photo?.id) return;
    this.abort?.abort();
    this.abort = new AbortController();
    const background = this.background.checked ? this.threshold.value / 100 : null;
    const body = JSON.stringify({ photo: photo.id, classes: this.text.value, background });
    let labels;
    try {
      labels = await (await ask("/api/segment", { method: "POST", body, signal: this.abort.signal })).json();
    } catch (error) {
      if (error.name === "AbortError") return;
      if (error.status === 410 && again) return this.show(photo); // dropped from the server's memory meanwhile
      if (error.status !== 422) throw error;
      return this.say(error.message, true);
    }
    if (this.current !== photo) return;
    await this.viewer.showLabels(labels);
    const names = labels.total - (background === null ? 0 : 1);
    this.say(`${names} ${names === 1 ? "class" : "classes"} in ${labels.ms < 10 ? labels.ms : Math.round(labels.ms)} ms`);
  }

  say(text, bad = false) {
    this.status.textContent = text;
    this.status.classList.toggle("bad", bad);
    this.text.setAttribute("aria-invalid", bad);
  }

  complain(text) {
    this.alert.textContent = text;
    this.alert.hidden = !text;
  }

  /** Run `work` with a busy picture; what goes wrong is told in one line, and the result is undefined. */
  async attempt(work, about = "") {
    const { stage } = this.viewer, busy = setTimeout(() => stage.setAttribute("aria-busy", "true"), 250);
    this.work = (this.work || 0) + 1;
    try {
      const result = await work();
      this.complain("");
      return result;
    } catch (error) {
      this.complain(about + error.message);
    } finally {
      clearTimeout(busy);
      if (!--this.work) stage.removeAttribute("aria-busy");
    }
  }
}

/** fetch that throws what the server answered: {message, status}. */
async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the demo does not answer; does it still run in its terminal?");
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({ error: `the demo answered ${response.status}` }));
  throw Object.assign(new Error(error), { status: response.status });
}

(async function start() {
  try {
    const info = await (await ask("/api/info")).json();
    const demo = new Demo(info);
    const samples = Array.from({ length: info.samples }, (_, number) => ({ url: `/samples/${number}.png`, name: `Sample ${number + 1}` }));
    for (const sample of samples) demo.place(sample);
    await demo.show(samples[0]);
  } catch (error) {
    const alert = document.getElementById("alert");
    alert.textContent = error.message;
    alert.hidden = false;
  }
})();
