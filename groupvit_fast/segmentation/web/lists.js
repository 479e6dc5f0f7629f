"use strict";
// The lists beside the picture and the words under the pointer.

/** Highlight the row of a label, if it is listed; null: none. */
function mark(side, label) {
  for (const row of side.querySelectorAll("[data-label]")) {
    row.classList.toggle("here", label !== null && row.dataset.label === String(label));
  }
}

function scoreText(score) {
  return score > 0 && score < 0.005 ? "< 0.01" : score.toFixed(2);
}

function swatch(colour) {
  const node = element("span", { class: "swatch" });
  node.style.backgroundColor = colour;
  return node;
}

function meter(share) {
  const fill = element("span", { class: "fill" });
  fill.style.width = `${Math.max(share * 100, 0.5)}%`;
  return element("span", { class: "meter", "aria-hidden": "true" }, fill);
}

function emphasis(viewer, label) {
  const on = () => viewer.emphasise(label), off = () => viewer.emphasise(null);
  return { onpointerenter: on, onpointerleave: off, onfocusin: on, onfocusout: off };
}

function heading(text, note, ...buttons) {
  return element("div", { class: "head" }, element("h2", {}, text), element("span", { class: "note" }, note), ...buttons);
}

// ---- classes

function classList(viewer) {
  const { classes, total } = viewer.labels;
  const present = classes.map((item, label) => ({ ...item, label })).filter((item) => item.share > 0);
  const setAll = (shown) => {
    present.forEach(({ name }) => (shown ? viewer.hidden.delete(name) : viewer.hidden.add(name)));
    viewer.refresh();
  };
  const button = (text, shown) => element("button", { type: "button", class: "link", onclick: () => setAll(shown) }, text);
  const rows = present.map((item) => classRow(viewer, item));
  const rest = total - present.length;
  return [
    heading("In this photo", `${present.length} of ${total}`, button("All", true), button("None", false)),
    element("ul", { class: "rows" }, ...rows),
    ...(rest ? [element("p", { class: "note" }, `${rest} of the classes ${rest === 1 ? "is" : "are"} nowhere in this photo.`)] : []),
  ];
}

function classRow(viewer, { name, colour, share, label }) {
  if (label === viewer.labels.background) {
    const cells = [swatch(colour), element("span", { class: "name" }, name), element("span", { class: "number" }, percent(share))];
    return element("li", { class: "row plain", "data-label": label }, ...cells, meter(share));
  }
  const box = element("input", {
    type: "checkbox", checked: !viewer.hidden.has(name), onchange: () => {
      if (box.checked) viewer.hidden.delete(name);
      else viewer.hidden.add(name);
      viewer.redraw();
    },
  });
  box.style.setProperty("--own", colour);
  const words = element("span", { class: "name", title: name }, name);
  const line = element("label", { class: "row" }, box, words, element("span", { class: "number" }, percent(share)), meter(share));
  return element("li", { "data-label": label, ...emphasis(viewer, label) }, line);
}

// ---- groups

function groupList(viewer) {
  const stage = viewer.photo.stages[viewer.view];
  const last = viewer.view === viewer.photo.stages.length - 1;
  const counts = new Map();
  for (const group of stage.map) counts.set(group, (counts.get(group) || 0) + 1);
  const rows = [...counts].sort((a, b) => b[1] - a[1]).map(([group, count]) => {
    const [best, note] = groupWords(viewer, stage, group, last);
    const cells = [
      swatch(stage.names[group]), element("span", { class: "name" }, `Group ${group + 1}`, element("span", { class: "note" }, best)),
      element("span", { class: "number" }, percent(count / stage.map.length)), meter(count / stage.map.length),
    ];
    const row = last
      ? element("button", { type: "button", class: "row", title: note, "aria-pressed": viewer.heat === group, onclick: () => viewer.showHeat(group) }, ...cells)
      : element("div", { class: "row plain", title: note }, ...cells);
    return element("li", { "data-label": group, ...emphasis(viewer, group) }, row);
  });
  const { boxes } = viewer.photo;
  const hint = (last ? "Choose a group to see how strongly it claims each place." : "Each of these joins a group of the next stage.")
    + (boxes.length > 1 ? ` The photo was seen in ${boxes.length} windows, each with groups of its own.` : "");
  return [heading(stage.title, `${counts.size} of ${stage.colours.length} in use`), element("p", { class: "note" }, hint), element("ul", { class: "rows" }, ...rows)];
}

function singular(stage) {
  return stage.title.replace(/s\b/, "").toLowerCase();
}

function groupWords(viewer, stage, group, last) {
  if (!last) return [`joins ${singular(viewer.photo.stages[viewer.view + 1])} ${stage.parents[group] + 1}`, ""];
  const { classes, groups } = viewer.labels;
  const words = groups[group].map(([label, score]) => `${classes[label].name} ${scoreText(score)}`);
  return [words[0], `Best classes: ${words.join(", ")}`];
}

// ---- under the pointer

/** {label, nodes, text} of what lies at a pixel of the maps, in the current view. */
function describe(viewer, place) {
  const { labels, photo, view } = viewer;
  const final = photo.stages.at(-1).map[place];
  const label = labels.map[place], { name, colour } = labels.classes[label];
  const score = labels.scoreMap[place] / 255, known = label !== labels.background;
  const group = typeof view === "number" ? photo.stages[view].map[place] : final;
  const stage = photo.stages[typeof view === "number" ? view : photo.stages.length - 1];
  const title = element("strong", {}, swatch(colour), name, known ? element("span", { class: "number" }, scoreText(score)) : "");
  const bars = labels.groups[final].map(([other, value]) => element(
    "li", {}, element("span", { class: "name" }, labels.classes[other].name), meter(value), element("span", { class: "number" }, scoreText(value)),
  ));
  const where = element("p", { class: "note" }, swatch(stage.names[group]), `in ${singular(stage)} ${group + 1}`);
  const text = `${name}${known ? `, score ${scoreText(score)}` : ""}; ${singular(stage)} ${group + 1}`;
  return { label: typeof view === "number" ? group : label, nodes: [title, where, element("ul", { class: "bars" }, ...bars)], text };
}
