"use strict";
// The self-contained page: all photos and labels lie inside it.

(async function showResult() {
  const { about, photos } = JSON.parse(document.getElementById("data").textContent);
  const viewer = new Viewer(document.getElementById("viewer"));
  const strip = document.getElementById("photos");
  document.getElementById("facts").textContent = about.join(" · ");
  themeButton(document.getElementById("theme"));

  async function show(number) {
    [...strip.children].forEach((button, index) => button.setAttribute("aria-pressed", index === number));
    if (await viewer.showPhoto(photos[number])) await viewer.showLabels(photos[number]);
  }

  strip.append(...photos.map((photo, number) => thumbnail(photo.picture, photo.name, () => show(number))));
  strip.hidden = photos.length < 2;
  await show(0);
})();
