// What stands under an answer: what it rests on, and how sure it is.

import { element } from "./markdown.js";
import { level, number, t } from "./strings.js";

export function facts(turn, model) {
  const { sampling, timings } = turn;
  const told = [
    [model.name, model.type, model.runtime].filter(Boolean).join(" "),
    ...turn.images.map((image) => [image.modality ?? image.format,
      image.window ? t("window", level(image.window[0]), level(image.window[1])) : null,
      image.frames > 1 ? t("frame", image.frame + 1, image.frames) : null,
      `SHA-256 ${image.seen_sha256.slice(0, 12)}…`].filter(Boolean).join(", ")),
    t("seed", sampling.seed, number(sampling.temperature, 2)),
    t("timing", number(timings.ttft_ms / 1000, 2), number(timings.decode_tokens / (timings.decode_ms / 1000 || 1))),
  ];
  told.splice(1, 0, ...evidence(model));
  if (model.unreleased) told.unshift(t("unreleased", model.unreleased));
  if (turn.finish !== "end") told.unshift(t(turn.finish === "stopped" ? "finishStopped" : "finishLength"));
  const sure = element("span", turn.how_sure ? howSure(turn.how_sure) : "");
  sure.className = "sure";
  const made = element("p", sure, told.join(" · "), element("br"), t("notice"));
  made.className = "facts";
  made.title = turn.images.map((image) => image.seen_sha256).join(" ");
  return made;
}

// How often answers of such a probability were right, where it was measured.
function howSure({ probability, right, ci_low, ci_high, answers, dataset }) {
  const percent = (share) => `${number(share * 100, 0)} %`;
  return t("howSure", percent(probability), answers, percent(right), percent(ci_low), percent(ci_high), dataset);
}

// What the export lost, as far as it was measured.
export function evidence(model) {
  const told = [];
  if (model.fidelity) {
    const { top1_agreement, mean_kld, tokens } = model.fidelity;
    told.push(t("fidelity", `${number(top1_agreement * 100)} %`, mean_kld.toPrecision(2), tokens));
  }
  if (model.verdict?.released && !model.unreleased) {
    const { loss, loss_high, max_loss, questions } = model.verdict;
    told.push(t("released", number(loss, 1), number(loss_high, 1), number(max_loss, 1), questions));
  }
  return told;
}
