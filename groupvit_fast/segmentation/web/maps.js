"use strict";
// Label maps: unpacking, and painting them over a photo.

const INFLATE = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array };
const LEAST_SIDE = 840; // small photos are enlarged by a whole factor to about this
const GREY = [0.299, 0.587, 0.114];
const NIGHT = [16, 18, 22], GLOW = [255, 176, 46]; // of soft maps

/** {type, shape, data} -> {values, shape}; data is base64 of deflated little-endian integers. */
async function unpack(map) {
  const bytes = Uint8Array.from(atob(map.data), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  return { values: new INFLATE[map.type](buffer), shape: map.shape };
}

function channels(colour) {
  return [1, 3, 5].map((start) => parseInt(colour.slice(start, start + 2), 16));
}

function loadImage(url) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("the photo cannot be shown"));
    image.src = url;
  });
}

/** Paints one photo with any labels onto a canvas. All maps have the size of the photo as shown. */
class Painter {
  constructor(canvas, image, [height, width]) {
    this.canvas = canvas;
    this.rows = height;
    this.columns = width;
    this.factor = Math.max(1, Math.min(12, Math.round(LEAST_SIDE / Math.max(width, height))));
    canvas.width = width * this.factor;
    canvas.height = height * this.factor;
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.context.imageSmoothingQuality = "high";
    this.context.drawImage(image, 0, 0, canvas.width, canvas.height);
    this.photo = this.context.getImageData(0, 0, canvas.width, canvas.height);
  }

  /** labels: one a pixel; strength(label) in 0..1 scales the opacity, 0 leaves the photo as it is. */
  paint(labels, colours, strength, opacity) {
    const { columns, rows, factor, photo } = this;
    const result = this.context.createImageData(photo.width, photo.height);
    const source = photo.data, target = result.data;
    const shares = colours.map((_, label) => strength(label) * opacity);
    const line = opacity > 0 && opacity < 1 ? 0.9 : opacity;
    for (let y = 0, place = 0; y < photo.height; y++) {
      const start = Math.floor(y / factor) * columns;
      const next = Math.min(Math.floor((y + 1) / factor), rows - 1) * columns;
      for (let x = 0; x < photo.width; x++, place += 4) {
        const column = Math.floor(x / factor);
        const label = labels[start + column];
        const right = labels[start + Math.min(Math.floor((x + 1) / factor), columns - 1)];
        const below = labels[next + column];
        let share = shares[label], colour = colours[label];
        const border = (right !== label && shares[right] + share > 0) || (below !== label && shares[below] + share > 0);
        if (border) [share, colour] = [line, [255, 255, 255]];
        const grey = GREY[0] * source[place] + GREY[1] * source[place + 1] + GREY[2] * source[place + 2];
        for (let channel = 0; channel < 3; channel++) {
          // A covered photo loses its colours, so that a colour means its label and nothing else.
          const under = share > 0 ? grey : source[place + channel];
          target[place + channel] = under * (1 - share) + colour[channel] * share;
        }
        target[place + 3] = 255;
      }
    }
    this.context.putImageData(result, 0, 0);
  }

  /** Lays a soft map (0..255 a patch) over the grey photo; box is [top, left, bottom, right] in 0..1. */
  paintHeat(values, [height, width], box, opacity) {
    const { width: full, height: tall } = this.canvas;
    this.paint(new Uint8Array(this.rows * this.columns), [NIGHT], () => 1, 0.55);
    const small = document.createElement("canvas");
    [small.width, small.height] = [width, height];
    const map = new ImageData(width, height);
    values.forEach((value, index) => map.data.set([...GLOW, value * opacity], index * 4));
    small.getContext("2d").putImageData(map, 0, 0);
    const [top, left, bottom, right] = box;
    this.context.drawImage(small, left * full, top * tall, (right - left) * full, (bottom - top) * tall);
  }
}
