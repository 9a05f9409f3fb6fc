// The review page: a viewer, a verdict per finding kept in this browser, a table to save.
(() => {
  "use strict";
  const page = JSON.parse(document.getElementById("page").textContent);
  const key = `medfusion-review:${page.case}:${page.results}`;
  const element = (id) => document.getElementById(id);
  const WARM = { R: [196, 196, 255], G: [84, 84, 213], B: [31, 31, 143], A: [0, 255, 255], I: [0, 1, 255] };
  const COLD = { R: [31, 31, 143], G: [119, 119, 220], B: [196, 196, 255], A: [0, 255, 255], I: [0, 1, 255] };
  const OUTLINE = { R: [0, 53], G: [0, 224], B: [0, 224], A: [0, 255], labels: ["", "finding"] };
  const COLUMNS =
    "case finding x y z i j k volume_ml peak mean direction p label verdict comment reviewer reviewed_at".split(" ");
  const SCAN = 0, MAP = 1;  // volumes of the viewer

  let viewer = null;
  let current = null;  // key of the chosen row: a finding's number, or M1, M2, ... for missed ones
  const review = Object.assign({ reviewer: "", findings: {}, missed: [] }, restored());

  // ---- What the reader entered

  function restored() {
    try {
      return JSON.parse(localStorage.getItem(key));
    } catch {
      return null;  // no storage in this browser, or another page spoilt it
    }
  }

  function keep() {
    try {
      localStorage.setItem(key, JSON.stringify(review));
    } catch {
      caution("This browser keeps nothing: save the CSV before you close or reload the page.");
    }
    showProgress();
  }

  function caution(text) {
    const present = [...element("cautions").children].some((item) => item.textContent === text);
    if (!present) element("cautions").appendChild(document.createElement("li")).textContent = text;
  }

  function record(id) {
    return review.missed.find((each) => each.finding === id) ?? (review.findings[id] ??= {});
  }

  function change(id, values) {
    Object.assign(record(id), values, { reviewed_at: new Date().toISOString() });
    keep();
  }

  function showProgress(saved = "") {
    const judged = page.findings.filter((finding) => review.findings[finding.number]?.verdict).length;
    const missed = review.missed.length ? `, ${review.missed.length} missed` : "";
    element("progress").textContent = saved || `${judged} of ${page.findings.length} judged${missed}`;
  }

  // ---- Rows

  const rows = () => [...document.querySelectorAll("#findings .finding")];
  const isMissed = (id) => id.startsWith("M");
  const rowOf = (id) => rows().find((row) => row.dataset.key === id);

  function bind(row) {
    const id = row.dataset.key;
    row.addEventListener("click", (event) => {
      if (!event.target.closest(".judgement")) choose(id);
    });
    row.addEventListener("focusin", (event) => {
      if (event.target.closest(".judgement") && current !== id) choose(id);
    });
    for (const button of row.querySelectorAll("input[type=radio]")) {
      button.checked = record(id).verdict === button.value;
      button.addEventListener("click", () => {
        judge(id, record(id).verdict === button.value ? "" : button.value);  // a second click takes it back
      });
    }
    const comment = row.querySelector(".comment");
    comment.value = record(id).comment ?? "";
    comment.addEventListener("input", () => change(id, { comment: comment.value }));
    row.querySelector(".remove")?.addEventListener("click", () => remove(id));
  }

  function judge(id, verdict) {
    for (const button of rowOf(id).querySelectorAll("input[type=radio]")) button.checked = button.value === verdict;
    change(id, { verdict });
  }

  function choose(id) {
    current = id;
    for (const row of rows()) {
      if (row.dataset.key === id) row.setAttribute("aria-current", "true");
      else row.removeAttribute("aria-current");
    }
    rowOf(id).scrollIntoView({ block: "nearest" });
    const finding = page.findings.find((each) => String(each.number) === id) ?? record(id);
    if (viewer) moveTo([finding.x, finding.y, finding.z]);
  }

  function step(by) {
    const ids = rows().map((row) => row.dataset.key);
    if (!ids.length) return;
    const next = current === null ? 0 : ids.indexOf(current) + by;
    choose(ids[Math.min(Math.max(next, 0), ids.length - 1)]);
  }

  function addMissed() {
    const [x, y, z] = crosshair().map((value) => Math.round(value * 10) / 10);
    const [i, j, k] = voxel(crosshair());
    const number = 1 + Math.max(0, ...review.missed.map((each) => Number(each.finding.slice(1))));
    review.missed.push({ finding: `M${number}`, x, y, z, i, j, k });
    change(`M${number}`, {});
    showMissed(review.missed.at(-1));
    choose(`M${number}`);
    rowOf(current).querySelector(".comment").focus();
  }

  function showMissed(missed) {
    const row = element("missed-row").content.querySelector("tbody").cloneNode(true);
    row.dataset.key = missed.finding;
    row.querySelector(".go").textContent = missed.finding;
    row.querySelector(".place").textContent = place([missed.x, missed.y, missed.z]);
    row.querySelector(".comment").setAttribute("aria-label", `Comment on missed finding ${missed.finding}`);
    element("findings").append(row);
    bind(row);
  }

  function remove(id) {
    review.missed = review.missed.filter((each) => each.finding !== id);
    rowOf(id).remove();
    if (current === id) current = null;
    keep();
  }

  // ---- The table

  function save() {
    const reviewed = (id) => ({ ...record(id), reviewer: review.reviewer });
    const content = [
      ...page.findings.map((finding) => ({ ...finding, finding: finding.number, ...reviewed(finding.number) })),
      ...review.missed.map((missed) => ({ ...reviewed(missed.finding), verdict: "missed" })),
    ];
    const lines = content.map((row) => COLUMNS.map((column) => cell({ ...row, case: page.case }[column])).join(","));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([[COLUMNS.join(","), ...lines, ""].join("\r\n")], { type: "text/csv" }));
    link.download = `${page.case}_review.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    showProgress(`Saved ${link.download}`);
  }

  // Spreadsheets run text that begins like a formula; numbers may begin with a minus.
  function cell(value) {
    if (typeof value !== "string") return String(value ?? "");
    const text = /^\s*[=+\-@\t\r]/.test(value) ? `'${value}` : value;
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }

  // ---- The viewer

  const place = (mm) =>
    mm.map((value, axis) => `${["LR", "PA", "IS"][axis][Number(value >= 0)]} ${Math.abs(value).toFixed(0)}`).join(", ");
  const voxel = ([x, y, z]) => page.to_voxel.map(([a, b, c, d]) => Math.round(a * x + b * y + c * z + d));
  const crosshair = () => [...viewer.frac2mm(viewer.scene.crosshairPos)].slice(0, 3);

  function moveTo(mm) {
    viewer.scene.crosshairPos = viewer.mm2frac(mm);
    viewer.createOnLocationChange();
    viewer.drawScene();
  }

  function showLocation({ mm, values }) {
    const position = [...mm].slice(0, 3);
    const size = values[MAP].value;
    const anomaly = size === 0 ? `within ±${page.least.toPrecision(3)}` : size.toPrecision(3);
    element("location").textContent = [
      `${place(position)} mm`,
      `voxel ${voxel(position).join(", ")}`,
      `scan ${values[SCAN].value.toPrecision(4)}`,
      `map ${anomaly}`,
    ].join("   ").replaceAll("-", "\u2212");
  }

  function showThreshold() {
    const value = Number(element("threshold").value);
    element("threshold-value").textContent = value.toPrecision(3);
    if (!viewer) return;
    viewer.volumes[MAP].cal_min = value;
    viewer.updateGLVolume();
  }

  function showOutline() {
    viewer.drawRimOpacity = Number(element("outline").checked);
    viewer.drawScene();
  }

  function resetWindow() {
    [viewer.volumes[SCAN].cal_min, viewer.volumes[SCAN].cal_max] = page.window;
    viewer.updateGLVolume();
  }

  async function openViewer() {
    const opened = await openNiivue(element("canvas"));
    opened.addColormap("warmer", WARM);
    opened.addColormap("colder", COLD);
    const load = (id, options) =>
      niivue.NVImage.loadFromBase64({ base64: element(`${id}-nifti`).textContent, name: `${id}.nii.gz`, ...options });
    const [low, high] = page.window;
    opened.addVolume(await load("scan", { colormap: "gray", cal_min: low, cal_max: high }));
    const map = await load("map", { colormap: "warmer", colormapNegative: "colder", cal_max: page.peak });
    map.cal_min = page.threshold;
    map.colormapType = 2;  // colours run from zero to the peak and stay as they are when the threshold moves
    map.opacity = Number(element("opacity").value);
    opened.addVolume(map);
    opened.setDrawColormap(OUTLINE);
    opened.setDrawOpacity(0.004);  // the inside: not seen, and not zero, which hides the rim too
    opened.drawRimOpacity = 1;
    opened.loadDrawing(await load("mask"));
    opened.onLocationChange = showLocation;
    return opened;
  }

  function withoutViewer(error) {
    document.body.classList.add("no-viewer");
    element("pictures").open = true;
    element("stage-notice").textContent = `No viewer: ${error.message}. The pictures below show the findings instead.`;
  }

  function withViewer(opened) {
    viewer = opened;
    window.review = { viewer };
    element("stage-notice").remove();
    element("pictures").open = false;
    element("add-missed").disabled = false;
    showThreshold();
    if (current ?? rows().length) step(0);
    else viewer.createOnLocationChange();
  }

  // ---- Keys and buttons

  const KEYS = { j: () => step(1), k: () => step(-1) };
  for (const verdict of ["true", "false", "unsure"]) {
    KEYS[verdict[0]] = () => {
      if (current !== null && !isMissed(current)) judge(current, verdict);
    };
  }
  const MOVES = {  // right and front of the patient are on the left
    ArrowLeft: [1, 0, 0], ArrowRight: [-1, 0, 0], ArrowUp: [0, 1, 0], ArrowDown: [0, -1, 0],
    PageUp: [0, 0, 1], PageDown: [0, 0, -1],
  };

  function onKey(event) {
    const typing = event.target.matches("input[type=text], select");
    if (event.ctrlKey || event.metaKey || event.altKey || typing) return;
    const onCanvas = event.target === element("canvas");
    if (onCanvas) event.stopPropagation();  // the viewer has keys of its own, other ones
    const move = onCanvas && viewer && MOVES[event.key];
    const action = move ? () => viewer.moveCrosshairInVox(...move) : KEYS[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  }

  document.addEventListener("keydown", onKey, true);
  element("reviewer").value = review.reviewer;
  element("reviewer").addEventListener("input", (event) => {
    review.reviewer = event.target.value;
    keep();
  });
  element("save").addEventListener("click", save);
  element("add-missed").addEventListener("click", addMissed);
  element("reset").addEventListener("click", resetWindow);
  element("plane").addEventListener("change", (event) => viewer.setSliceType(niivue.SLICE_TYPE[event.target.value]));
  element("threshold").addEventListener("input", showThreshold);
  element("opacity").addEventListener("input", (event) => viewer.setOpacity(MAP, Number(event.target.value)));
  element("outline").addEventListener("change", showOutline);
  rows().forEach(bind);
  review.missed.forEach(showMissed);
  showProgress();
  showThreshold();
  openViewer().then(withViewer, withoutViewer);
})();
