// The original beside the result: while a key is held, by a slider, and by the stages of the network.
import { $, editor, isFree, quiet, say, showBlob, view } from "./page.js";
import { t } from "./text.js";

export function peek(on) {
  if (on && !editor.picture?.position) return;
  view.peek(on);
  $("#peek").classList.toggle("held", on);
  $("#badge").hidden = !on;
}
const button = $("#peek");
button.addEventListener("pointerdown", () => peek(true));
for (const name of ["pointerup", "pointercancel", "pointerleave", "blur"]) button.addEventListener(name, () => peek(false));
button.addEventListener("keydown", (event) => [" ", "Enter"].includes(event.key) && peek(true));
button.addEventListener("keyup", () => peek(false));

export async function compare() {
  const { picture } = editor;
  const dialog = $("#slider");
  if (dialog.open) {
    dialog.close();
    return;
  }
  if (!picture?.position) return;
  try {
    const blobs = await Promise.all(
      [0, picture.position].map(async (position) => {
        const response = await editor.callFor(picture, `/view?position=${position}`);
        return response.blob();
      }),
    );
    if (!isFree(picture)) return;
    const slider = document.createElement("img-comparison-slider");
    const attributes = { role: "slider", "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": 50, keyboard: "enabled" };
    for (const [name, value] of Object.entries(attributes)) slider.setAttribute(name, value);
    slider.setAttribute("aria-label", t("sliderLabel"));
    slider.addEventListener("slide", (event) => slider.setAttribute("aria-valuenow", String(Math.round(event.target.value))));
    ["before", "after"].forEach((name, i) => {
      const image = document.createElement("img");
      image.slot = ["first", "second"][i];
      image.alt = t(name);
      image.width = picture.width;
      image.height = picture.height;
      showBlob(image, blobs[i]);
      slider.append(image);
    });
    $("#slider-place").replaceChildren(slider);
    const room = [innerWidth - (innerWidth > 720 ? 96 : 50), innerHeight - 140];
    const scale = Math.min(room[0] / picture.width, room[1] / picture.height);
    slider.style.width = `${Math.round(picture.width * scale)}px`;
    slider.style.height = `${Math.round(picture.height * scale)}px`;
    dialog.showModal();
    slider.focus();
  } catch (error) {
    editor.fail(error, picture);
  }
}

export async function stages() {
  const dialog = $("#stage-dialog");
  if (dialog.open) {
    dialog.close();
    return;
  }
  const { picture } = editor;
  if (!picture?.position) {
    say(t("stagesNone"));
    return;
  }
  say(t("stagesMaking"), "busy");
  try {
    const told = await (await editor.callFor(picture, `/stages?position=${picture.position}`)).json();
    quiet();
    if (!isFree(picture)) return;
    $("#stage-figures").replaceChildren(
      ...told.stages.map(({ name, image }) => {
        const figure = document.createElement("figure");
        const shown = document.createElement("img");
        shown.src = image;
        shown.alt = "";
        const caption = document.createElement("figcaption");
        caption.textContent = t(`stage_${name}`);
        figure.append(shown, caption);
        return figure;
      }),
    );
    dialog.showModal();
  } catch (error) {
    editor.fail(error, picture);
  }
}
