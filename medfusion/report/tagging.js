// The tagging page: one case after the other in a viewer; every tag is sent to the server at once.
(() => {
  "use strict";
  const element = (id) => document.getElementById(id);
  const COLOURS = { prediction: "red", truth: "green" };
  const OPACITY = 0.35;

  let study = null;  // cases, tags, and what this reviewer did
  let current = null;  // number of the case that is shown
  let viewer = null;
  let shown = [];  // names of the viewer's volumes
  let loading = 0;  // the case that was asked for last wins
  let waiting = Promise.resolve();  // what the reviewer does is done in order, however fast the keys

  // ---- The server

  // Whether the server has stored it; what it has not, the page does not show.
  async function send(place, body) {
    try {
      const answer = await fetch(place, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ reviewer: reviewer(), ...body }),
      });
      if (!answer.ok) throw new Error(await answer.text());
      element("cautions").replaceChildren();
      return true;
    } catch (error) {
      caution(`Not stored: ${error.message}. Is the server still running? Do it again when it is.`);
      return false;
    }
  }

  const inTurn = (action) => (waiting = waiting.then(action).catch((error) => caution(error.message)));

  async function refresh() {
    const answer = await fetch(`study/${encodeURIComponent(reviewer())}`);
    if (!answer.ok) throw new Error(await answer.text());
    study = await answer.json();
    draw();
  }

  const reviewer = () => element("reviewer").value.trim();

  function caution(text) {
    const item = document.createElement("li");
    item.textContent = text;
    element("cautions").replaceChildren(item);
  }

  // ---- What the reviewer does

  // A case counts as seen when it is left, so that one without a tag counts too. It is not left before that is stored.
  async function go(number) {
    if (number < 0 || number >= study.cases.length || number === current) return;
    if (current !== null && !(await leave())) return;
    current = number;
    draw();
    show(number);
  }

  async function leave() {
    if (!(await comment()) || !(await send("see", { case: current }))) return false;
    study.seen[study.cases[current]] = now();
    return true;
  }

  async function toggle(tag) {
    const name = study.cases[current];
    const given = new Set(study.given[name]);
    const on = !given.has(tag);
    if (!(await send("give", { case: current, tag, on }))) return;
    if (on) given.add(tag);
    else given.delete(tag);
    study.given[name] = [...given];
    study.seen[name] = now();
    draw();
  }

  async function addTag(text) {
    if (!text.trim() || !(await send("new", { tag: text }))) return;
    element("new-tag").value = "";
    element("new-tag").blur();
    await refresh();
  }

  async function comment() {
    const name = study.cases[current], text = element("comment").value.trim();
    if (text === (study.comments[name] ?? "")) return true;
    const stored = await send("comment", { case: current, text });
    if (stored) study.comments[name] = text;
    return stored;
  }

  const now = () => new Date().toISOString().replace("Z", "000+00:00");  // as the store writes it

  // ---- What is drawn

  function draw() {
    const name = study.cases[current];
    element("side").hidden = current === null;
    const seen = study.cases.filter((each) => study.seen[each]).length;
    element("progress").textContent = `${seen} of ${study.cases.length} seen`;
    if (current === null) return;
    element("case").textContent = `Case ${current + 1} of ${study.cases.length}: ${name}`;
    const given = study.given[name] ?? [];
    element("tags").replaceChildren(...study.tags.map(([tag], place) => {
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-pressed", given.includes(tag));
      const key = document.createElement("kbd");
      key.textContent = place < 9 ? place + 1 : "";
      button.append(key, tag);
      button.addEventListener("click", () => inTurn(() => toggle(tag)));
      return item(button);
    }));
    element("comment").value = study.comments[name] ?? "";
    element("cases").replaceChildren(...study.cases.map((each, number) => caseButton(each, number)));
    const newest = study.tags.map(([, made]) => made).sort().at(-1);
    const again = study.cases.filter((each) => study.seen[each] && study.seen[each] < newest);
    element("revisit").hidden = !again.length;
    element("revisit").querySelector("ul").replaceChildren(
      ...again.map((each) => caseButton(each, study.cases.indexOf(each))),
    );
  }

  function caseButton(name, number) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = number + 1;
    button.title = name;
    button.classList.toggle("seen", Boolean(study.seen[name]));
    if (number === current) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => inTurn(() => go(number)));
    return item(button);
  }

  function item(content) {
    const found = document.createElement("li");
    found.append(content);
    return found;
  }

  // ---- The viewer

  async function show(number) {
    const turn = ++loading;
    const notice = element("stage-notice");
    notice.hidden = false;
    notice.textContent = "Loading the scan.";
    try {
      const names = await (await fetch(`image/${number}/names`)).json();
      if (!names.length) throw new Error("none was given with this study; look at the case where it is at home");
      viewer ??= await openNiivue(element("canvas"));
      const volumes = [];
      for (const name of names) {
        const answer = await fetch(`image/${number}/${name}.nii.gz`);
        if (!answer.ok) throw new Error(await answer.text());
        const options = COLOURS[name] ? { colormap: COLOURS[name], opacity: opacity(name) } : { colormap: "gray" };
        volumes.push(await niivue.NVImage.loadFromBase64({
          base64: base64(new Uint8Array(await answer.arrayBuffer())), name: `${name}.nii.gz`, ...options,
        }));
      }
      if (turn !== loading) return;
      while (viewer.volumes.length) viewer.removeVolume(viewer.volumes[0]);
      shown = names;
      for (const volume of volumes) viewer.addVolume(volume);
      notice.hidden = true;
      window.tagging = { viewer, number };
    } catch (error) {
      if (turn === loading) notice.textContent = `No picture: ${error.message}`;
    }
  }

  function base64(bytes) {
    let text = "";
    for (let at = 0; at < bytes.length; at += 32768) text += String.fromCharCode(...bytes.subarray(at, at + 32768));
    return btoa(text);
  }

  const opacity = (name) => (element(`show-${name}`).checked ? OPACITY : 0);

  function overlay(name) {
    if (viewer && shown.includes(name)) viewer.setOpacity(shown.indexOf(name), opacity(name));
  }

  // ---- Keys and buttons

  const KEYS = {
    j: () => inTurn(() => go(current + 1)), ArrowRight: () => inTurn(() => go(current + 1)),
    k: () => inTurn(() => go(current - 1)), ArrowLeft: () => inTurn(() => go(current - 1)),
    c: () => element("comment").focus(), n: () => element("new-tag").focus(),
    p: () => element("show-prediction").click(), t: () => element("show-truth").click(),
  };

  function onKey(event) {
    if (event.key === "Escape") return document.activeElement.blur();
    const typing = event.target.matches("input[type=text], textarea, select");
    if (event.ctrlKey || event.metaKey || event.altKey || typing || current === null) return;
    const tag = /^[1-9]$/.test(event.key) ? study.tags[Number(event.key) - 1]?.[0] : undefined;
    const action = tag !== undefined ? () => inTurn(() => toggle(tag)) : KEYS[event.key];
    if (!action) return;
    event.preventDefault();
    event.stopPropagation();  // the viewer has keys of its own, other ones
    action();
  }

  async function begin() {
    if (!reviewer()) return;
    element("reviewer").readOnly = true;
    try {
      await refresh();
    } catch (error) {
      element("reviewer").readOnly = false;
      return caution(`The study cannot be read: ${error.message}`);
    }
    element("reviewer").blur();
    const unseen = study.cases.findIndex((name) => !study.seen[name]);
    await go(Math.max(unseen, 0));
  }

  document.addEventListener("keydown", onKey, true);
  element("reviewer").addEventListener("keydown", (event) => { if (event.key === "Enter") inTurn(begin); });
  element("new-tag").addEventListener("keydown", (event) => { if (event.key === "Enter") inTurn(() => addTag(event.target.value)); });
  element("comment").addEventListener("change", () => inTurn(comment));
  element("previous").addEventListener("click", KEYS.k);
  element("next").addEventListener("click", KEYS.j);
  element("export").addEventListener("click", (event) => {  // with the case that is on the screen
    event.preventDefault();
    inTurn(async () => {
      if (current === null || (await leave())) location.assign(event.target.href);
      if (current !== null) draw();
    });
  });
  element("plane").addEventListener("change", (event) => viewer?.setSliceType(niivue.SLICE_TYPE[event.target.value]));
  for (const name of Object.keys(COLOURS)) element(`show-${name}`).addEventListener("change", () => overlay(name));
})();
