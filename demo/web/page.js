// The page: takes a model and pictures, shows classes and times. What it computes is in classifier.js.

import { Mistake, classify, open, softmax } from "./classifier.js";

const SHOWN = 5; // classes of a picture
const [status, problem, results, models, pictures] = ["status", "problem", "results", "models", "pictures"].map((id) =>
  document.getElementById(id),
);
let model;
let work = Promise.resolve(); // one thing at a time, in the order in which they came
let waiting = 0;

/** Do something after everything else, and show what goes wrong. */
function later(task) {
  waiting += 1;
  results.ariaBusy = "true";
  const before = work;
  work = (async () => {
    await before;
    try {
      await task();
    } catch (error) {
      const line = document.createElement("p");
      line.textContent = error instanceof Mistake ? error.message : `This should not happen: ${error.stack}`;
      problem.append(line);
    }
    waiting -= 1;
    say(model ? "Choose, drop or paste pictures." : "Choose a model, or drop its two files here.");
    results.ariaBusy = String(waiting > 0);
  })();
}

function say(text) {
  status.textContent = model ? `${model.title}. ${text}` : text;
}

function take(files) {
  problem.replaceChildren();
  const parts = [...files].filter(({ name }) => /\.(onnx|json)$/i.test(name));
  if (parts.length) later(() => load(parts));
  for (const file of files) if (!parts.includes(file)) later(() => show(file));
}

async function fetched(path) {
  const answer = await fetch(path).catch(() => ({ status: "nothing" })); // the page may read only its own server
  if (!answer.ok) throw new Mistake(`${new URL(path, location).href} cannot be read from this server: it answers ${answer.status}.`);
  return new File([await answer.blob()], path.split("/").at(-1));
}

async function load(files) {
  const [graph, description] = [/\.onnx$/i, /\.json$/i].map((end) => files.find(({ name }) => end.test(name)));
  if (files.length !== 2 || !graph || !description) {
    throw new Mistake("A model is two files: choose or drop its .onnx file and its .json file together.");
  }
  say(`Loading ${graph.name}…`);
  const start = performance.now();
  const opened = await open(graph, description);
  const [, height, width] = opened.input.input_size;
  const classes = `${opened.about.num_classes.toLocaleString("en")} classes`;
  const [megabytes, seconds] = [graph.size / 1e6, (performance.now() - start) / 1000].map((value) => value.toFixed(1));
  const size = `${width} × ${height} pixels, ${classes}, ${megabytes} MB`;
  opened.title = `${graph.name}: ${size}, loaded in ${seconds} s`;
  await model?.session.release();
  model = opened;
  results.replaceChildren();
}

async function show(file) {
  if (!model) throw new Mistake(`Choose a model before ${file.name}.`);
  say(`Classifying ${file.name}…`);
  const { logits, prepared, computed, transparent } = await classify(model, file);
  const card = document.querySelector("template").content.cloneNode(true);
  const [image, title, rows, note] = ["img", "h2", "tbody", ".note"].map((part) => card.querySelector(part));
  image.src = URL.createObjectURL(file);
  image.alt = `The picture ${file.name}`;
  image.style.imageOrientation = model.about.exif ? "from-image" : "none"; // as the model sees it
  title.textContent = file.name;
  const ranked = [...softmax(logits).entries()].sort(([, a], [, b]) => b - a);
  for (const [label, share] of ranked.slice(0, SHOWN)) {
    const row = rows.insertRow();
    const head = row.appendChild(document.createElement("th"));
    head.scope = "row";
    head.textContent = model.about.label_names?.[label] || `class ${label}`;
    row.insertCell().textContent = `${(100 * share).toFixed(1)} %`;
    row.style.setProperty("--share", share);
  }
  note.textContent = `Prepared in ${prepared.toFixed(0)} ms, classified in ${computed.toFixed(0)} ms.`;
  if (transparent) {
    note.textContent += " Parts of it are transparent: a browser loses their colours, which Python would classify.";
  }
  results.prepend(card);
}

for (const input of [models, pictures]) {
  input.addEventListener("change", () => {
    take([...input.files]);
    input.value = ""; // so that the same file can be chosen again
  });
}
addEventListener("paste", ({ clipboardData }) => take(clipboardData.files));
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  take(event.dataTransfer.files);
});
const path = new URLSearchParams(location.search).get("model");
later(async () => {
  if (!path) return;
  if (!path.endsWith(".onnx")) throw new Mistake(`?model=${path} names no .onnx file.`);
  say(`Loading ${path}…`);
  const graph = await fetched(path);
  const description = await fetched(path.replace(/onnx$/, "json")).catch(({ message }) => {
    throw new Mistake(`${message} export.py writes it beside the .onnx file.`);
  });
  await load([graph, description]);
});
