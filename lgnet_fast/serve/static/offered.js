// What the server offers, asked for while the other modules are still loaded. page.js tells a failure.
import { json } from "./api.js";

export const offered = json("api/v1/page");
offered.catch(() => {});
