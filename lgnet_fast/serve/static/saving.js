// What leaves the page: the picture as a file or a copy, its mask, and all pictures as a zip file.
import { shownFill } from "./editor.js";
import { encode } from "./mask.js";
import { editor, say } from "./page.js";
import { settings } from "./settings.js";
import { shorten, t } from "./text.js";
import { downloadZip } from "./vendor/client-zip.js";

// What follows "image/" in the media type -> the extensions of such files, where they differ.
const EXTENSIONS = {
  jpeg: ["jpg", "jpeg", "jpe", "jfif"],
  png: ["png", "apng"],
  tiff: ["tif", "tiff"],
  heif: ["heic", "heif", "hif"],
  jp2: ["jp2", "j2k", "jpx", "jpf"],
  "x-portable-pixmap": ["ppm", "pgm", "pbm", "pnm"],
  "x-tga": ["tga"],
};
const stem = (name) => name.replace(/\.[^.]*$/, "");

function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

async function result(picture, format) {
  const query = new URLSearchParams({ position: picture.position, ...(format && { format }) });
  const response = await editor.callFor(picture, `/result?${query}`);
  return response.blob();
}

/** The file of a picture with its fills: {blob, name}. */
async function fileOf(picture, format) {
  const blob = await result(picture, format);
  const kind = blob.type.split("/")[1];
  const own = picture.name.split(".").pop();
  const extensions = EXTENSIONS[kind] ?? [kind];
  const extension = extensions.includes(own.toLowerCase()) ? own : extensions[0]; // a file may have a wrong name
  return { blob, name: `${stem(picture.name)}_filled.${extension}` };
}

export async function save() {
  const { picture } = editor;
  if (!picture) return;
  const { format } = settings;
  const shown = shownFill(picture); // a fill may end while the file is made
  if (picture.saving && picture.saving.shown === shown && picture.saving.format === format) return; // pressed twice
  const saving = (picture.saving = { shown, format });
  say(t("saving"), "busy");
  try {
    const { blob, name } = await fileOf(picture, format);
    download(blob, name);
    picture.saved = shown;
    say(t("saved", { name: shorten(name) }), "done");
  } catch (error) {
    editor.fail(error, picture);
  } finally {
    if (picture.saving === saving) picture.saving = null;
  }
}

/** A name that `taken` does not have, whose members are compared as file systems without case do. */
function another(name, taken) {
  let found = name;
  for (let number = 2; taken.has(found.toLowerCase()); number++) found = `${stem(name)}-${number}.${name.split(".").pop()}`;
  taken.add(found.toLowerCase());
  return found;
}

let savingAll = null; // the pictures whose files are being made

/** Saves the pictures with fills in one zip file: all of them or, after an error, none. */
export async function saveAll() {
  const { pictures } = editor;
  if (savingAll === pictures) return; // pressed twice
  const filled = pictures.filter((one) => one.open && one.position > 0);
  if (!filled.length) {
    say(t("noneFilled"));
    return;
  }
  savingAll = pictures;
  const { format } = settings;
  const [files, taken] = [[], new Set()];
  let picture;
  try {
    for (picture of filled) {
      say(t("savingAll", { number: files.length + 1, count: filled.length }), "busy");
      const shown = shownFill(picture);
      const { blob, name } = await fileOf(picture, format);
      if (editor.pictures !== pictures) return; // others were opened
      files.push({ picture, shown, input: blob, name: another(name, taken) });
    }
    download(await downloadZip(files).blob(), "filled.zip");
    for (const { picture, shown } of files) picture.saved = shown;
    say(t("savedAll", { count: files.length }), "done");
  } catch (error) {
    editor.fail(error, picture);
  } finally {
    if (savingAll === pictures) savingAll = null;
  }
}

export async function copy() {
  const { picture } = editor;
  if (!picture) return;
  if (!navigator.clipboard) {
    say(t("noClipboard"), "error");
    return;
  }
  say(t("copying"), "busy");
  try {
    await navigator.clipboard.write([new ClipboardItem({ "image/png": result(picture, "png") })]);
    say(t("copied"), "done");
  } catch (error) {
    editor.fail(error, picture);
  }
}

export async function exportMask() {
  const { picture } = editor;
  const blob = picture && (await encode(picture.pending, { x: 0, y: 0, width: picture.width, height: picture.height }, picture));
  if (blob) download(blob, `${stem(picture.name)}_mask.png`);
  else say(t("nothing"));
}
