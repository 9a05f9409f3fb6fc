// The viewer of every page: three planes in world millimetres, the patient's right on the left, no keys of its own.
async function openNiivue(canvas) {
  "use strict";
  if (!document.createElement("canvas").getContext("webgl2")) throw new Error("this browser has no WebGL 2");
  const opened = new niivue.Niivue({
    isRadiologicalConvention: true,
    sagittalNoseLeft: true,
    isSliceMM: true,
    multiplanarShowRender: niivue.SHOW_RENDER.NEVER,
    multiplanarPadPixels: 4,
    crosshairColor: [0.95, 0.85, 0.35, 0.8],
    crosshairWidth: 0.5,
    crosshairWidthUnit: "mm",
    crosshairGap: 20,
    fontColor: [0.75, 0.78, 0.82, 1],
    dragAndDropEnabled: false,
    clipPlaneHotKey: "",
    cycleClipPlaneHotKey: "",
    viewModeHotKey: "",
    logLevel: "error",
  });
  await opened.attachToCanvas(canvas);
  return opened;
}
