// Classify pictures with an exported model, from the same pixels as Python's evaluation; the page is in page.js.

/** What the user can mend, in plain words. */
export class Mistake extends Error {}

/**
 * Open what `tools/export.py CKPT --to onnx` has written.
 *
 * @param {File} graph The .onnx file.
 * @param {File} description The .json file beside it.
 * @returns {Promise<object>} The model: `about` (what the .json file says), its `input`, the `session` of onnxruntime.
 */
export async function open(graph, description) {
  const bytes = await graph.arrayBuffer();
  const about = await described(graph, bytes, description);
  const runtime = "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
  const ort = await import(runtime).catch(() => {
    throw new Mistake("onnxruntime-web is missing: run “npm install” in demo/web, and load this page again.");
  });
  ort.env.logLevel = "error";
  ort.env.wasm.proxy = true; // in a worker, so that the page answers meanwhile
  const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] }).catch((error) => {
    throw new Mistake(`${graph.name} cannot be opened as a model: ${error.message}`);
  });
  return { ort, session, about, input: about.pretrained_cfg };
}

/** Return what the .json file says; throw a Mistake if the page cannot show this model's classes. */
async function described(graph, bytes, description) {
  const { name } = description;
  let about;
  try {
    about = JSON.parse(await description.text());
  } catch {
    throw new Mistake(`${name} is no JSON file.`);
  }
  const input = about?.pretrained_cfg;
  if (!Array.isArray(input?.input_size) || !about.files) {
    throw new Mistake(`${name} does not describe a model: take the one that tools/export.py wrote beside the model.`);
  }
  const names = Object.keys(about.files);
  if (names.includes(`${graph.name}.data`)) {
    throw new Mistake(`The weights of ${graph.name} are in a second file: the model is too large for a browser.`);
  }
  // browsers compute checksums only for pages from this machine and over HTTPS
  if (crypto.subtle && !Object.values(about.files).includes(await sha256(bytes))) {
    throw new Mistake(`${name} describes ${names.join(", ")}, and ${graph.name} has another content.`);
  }
  if (about.task === "detection") throw new Mistake(`${graph.name} finds objects: this page is for classifiers.`);
  if (!about.num_classes) {
    throw new Mistake(`${graph.name} has no classes: export a classifier, without --encoder.`);
  }
  const [channels] = input.input_size;
  if (channels !== 1 && channels !== 3) {
    throw new Mistake(`${graph.name} is for images of ${channels} channels; a browser's pictures have one or three.`);
  }
  if (input.interpolation !== "bicubic" || input.crop_mode !== "squash") {
    const asked = `${input.interpolation}, ${input.crop_mode}`;
    throw new Mistake(`${name} asks for another resize than this page has: ${asked}.`);
  }
  return about;
}

async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * Compute the logits of a picture.
 *
 * @param {object} model From `open`.
 * @param {Blob} file The content of an image file, in a format that the browser knows.
 * @returns {Promise<{logits: Float32Array, prepared: number, computed: number, transparent: boolean}>} With the
 *   milliseconds that it took to make the input of the picture and to compute the logits.
 */
export async function classify(model, file) {
  const start = performance.now();
  const { pixels, transparent } = await readPixels(file, model.input, model.about.exif);
  const imgs = new model.ort.Tensor("float32", normalized(pixels, model.input), [1, ...model.input.input_size]);
  const between = performance.now();
  const { logits } = await model.session.run({ imgs });
  const computed = performance.now() - between;
  return { logits: logits.data, prepared: between - start, computed, transparent };
}

/** Return the probabilities of logits. */
export function softmax(logits) {
  const largest = logits.reduce((a, b) => Math.max(a, b));
  const powers = Array.from(logits, (logit) => Math.exp(logit - largest));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}

/**
 * Decode a picture, resize it to (H, W) / crop_pct, and cut out its centre, to the bytes that Pillow computes.
 *
 * @param {Blob} file The content of an image file.
 * @param {{input_size: number[], crop_pct: number}} input The model's: channels, height and width; share of the crop.
 * @param {boolean} exif Whether to turn the picture as its EXIF data says.
 * @returns {Promise<{pixels: Uint8ClampedArray, transparent: boolean}>} (H, W, C), and whether parts of the picture are
 *   transparent: canvases lose their colours, which Pillow reads.
 */
export async function readPixels(file, { input_size: [channels, height, width], crop_pct: share }, exif) {
  const as = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
  const decoded = async () => createImageBitmap(exif ? file : await withoutExif(file), as);
  const bitmap = await decoded().catch(() => {
    throw new Mistake(`${file.name ?? "This"} is no picture that the browser can decode.`);
  });
  try {
    if (bitmap.width > WIDEST) throw new Mistake(`${file.name ?? "This"} is wider than ${WIDEST} pixels.`);
    const across = filter(bitmap.width, Math.trunc(width / share), width);
    const down = filter(bitmap.height, Math.trunc(height / share), height);
    const top = down[0].first;
    const rows = down.at(-1).first + down.at(-1).weights.length - top;
    const canvas = new OffscreenCanvas(bitmap.width, Math.min(rows, STRIP));
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.globalCompositeOperation = "copy";
    const narrow = new Uint8ClampedArray(rows * width * channels);
    let transparent = false;
    for (let row = 0; row < rows; row += STRIP) {
      const count = Math.min(rows - row, STRIP);
      context.drawImage(bitmap, 0, -top - row);
      const { data } = context.getImageData(0, 0, bitmap.width, count);
      for (let i = 0; i < data.length; i += 4) {
        transparent ||= data[i + 3] < 255;
        if (channels === 1) data[i] = (19595 * data[i] + 38470 * data[i + 1] + 7471 * data[i + 2] + 32768) >> 16;
      }
      const target = narrow.subarray(row * width * channels);
      resample(data, 4, 4 * bitmap.width, target, channels, width * channels, count, across, channels);
    }
    const pixels = new Uint8ClampedArray(height * width * channels);
    const shifted = down.map(({ first, weights }) => ({ first: first - top, weights }));
    resample(narrow, width * channels, channels, pixels, width * channels, channels, width, shifted, channels);
    return { pixels, transparent };
  } finally {
    bitmap.close();
  }
}

/** Return a JPEG or a PNG without its EXIF data: browsers turn a picture by them, whatever they are asked for. */
async function withoutExif(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  const view = new DataView(bytes.buffer);
  const reads = (at, text) => text === String.fromCharCode(...bytes.subarray(at, at + text.length));
  if (reads(0, "\xff\xd8")) {
    for (let at = 2; at + 10 < bytes.length && bytes[at] === 0xff && bytes[at + 1] !== 0xda; ) {
      if (bytes[at + 1] === 0xe1 && reads(at + 4, "Exif")) bytes[at + 4] = 0; // decoders skip what they do not know
      at += bytes[at + 1] === 0xff ? 1 : 2 + view.getUint16(at + 2); // a marker may be padded
    }
  } else if (reads(0, "\x89PNG")) {
    for (let at = 8, end; at + 12 <= bytes.length; at = end) {
      end = at + 12 + view.getUint32(at);
      if (reads(at + 4, "eXIf")) return new Blob([bytes.subarray(0, at), bytes.subarray(end)]);
    }
  }
  return new Blob([bytes]);
}

const STRIP = 256; // rows that are read at a time, so that a large picture is in memory once
const WIDEST = 32767; // pixels that a canvas has in every browser
const BITS = 22; // of a weight's fraction, as in Pillow

/** Return the bicubic filter (a = -0.5) at x. */
function bicubic(x) {
  const d = Math.abs(x);
  if (d < 1) return (1.5 * d - 2.5) * d * d + 1;
  return d < 2 ? -0.5 * (((d - 5) * d + 8) * d - 4) : 0;
}

/**
 * Return how the central `kept` of `count` new pixels follow from `size` old ones. The filter widens when it shrinks.
 *
 * @returns {{first: number, weights: Int32Array}[]} For each, the first old pixel, and the weights from there on.
 */
function filter(size, count, kept) {
  const scale = size / count;
  const wide = Math.max(scale, 1);
  const margin = (count - kept) / 2; // a half is rounded to the even number, as Python does
  const skipped = margin % 2 === 0.5 ? Math.floor(margin) : Math.round(margin);
  return Array.from({ length: kept }, (_, place) => {
    const centre = (skipped + place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - 2 * wide + 0.5));
    const end = Math.min(size, Math.trunc(centre + 2 * wide + 0.5));
    const found = Array.from({ length: end - first }, (_, n) => bicubic((first + n - centre + 0.5) / wide));
    const sum = found.reduce((a, b) => a + b);
    return { first, weights: Int32Array.from(found, (weight) => Math.round((weight / sum) * 2 ** BITS)) };
  });
}

/** Filter `lines` lines of bytes; `step` is from pixel to pixel, `line` from line to line. */
function resample(from, step, line, to, toStep, toLine, lines, places, channels) {
  for (let n = 0; n < lines; n++) {
    for (let place = 0; place < places.length; place++) {
      const { first, weights } = places[place];
      for (let channel = 0; channel < channels; channel++) {
        let at = n * line + first * step + channel;
        let sum = 1 << (BITS - 1);
        for (let k = 0; k < weights.length; k++, at += step) sum += weights[k] * from[at];
        to[n * toLine + place * toStep + channel] = sum >> BITS; // an array of this type clamps to 0 to 255
      }
    }
  }
}

/** Return bytes (H, W, C) as float32 (C, H, W), from 0 to 1, less the mean, divided by the deviation. */
function normalized(pixels, { input_size: [channels, height, width], mean, std }) {
  const imgs = new Float32Array(pixels.length);
  for (let channel = 0; channel < channels; channel++) {
    const table = Float32Array.from({ length: 256 }, (_, byte) => {
      return Math.fround(Math.fround(byte / 255) - Math.fround(mean[channel])) / Math.fround(std[channel]);
    });
    for (let i = 0, at = channel * height * width; i < height * width; i++) {
      imgs[at++] = table[pixels[i * channels + channel]];
    }
  }
  return imgs;
}
