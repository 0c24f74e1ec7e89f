// See step.h.
#include "step.h"

namespace lgnet {

char* Run::scratch(int64_t bytes) const {
  if (bytes > memory.scratch.bytes()) {
    memory.scratch = Pages();  // freed before the new one is allocated, so that both never exist at once
    memory.scratch = Pages(bytes);
  }
  return memory.scratch.as<char>();
}

Input input_of(const ConvStep& step, const Run& run) {
  const MapSpec& source = step.source;
  Input input;
  input.source = {run.map(source), source.height, source.width, source.pixel, source.channels, source.bf16};
  input.in_step = step.in_step;
  input.reflect = step.reflect;
  input.zeros = run.zeros;
  return input;
}

Output output_of(const ConvStep& step, const Run& run) {
  Output output{};
  output.bias = reinterpret_cast<const float*>(step.bias);
  output.channels = step.out_channels;
  output.height = step.out_height;
  output.width = step.out_width;
  output.out_step = step.out_step;
  if (step.residual) {
    output.residual = run.map(*step.residual);
    output.residual_pixel = step.residual->pixel;
    output.residual_bf16 = step.residual->bf16;
  }
  const ConvKernels& kernels = run.kernels.conv.f32;
  const int64_t pixels = run.batch * step.out_height * step.out_width;
  for (const TargetSpec& target : step.targets) {
    const bool aligned = (target.offset | target.pixel | step.out_channels) % kernels.lanes == 0;
    // Counted as floats: a map of bf16 is streamed where that of floats is, which measured best.
    const bool stream = aligned && 4 * pixels * step.out_channels > kernels.stream_bytes;
    output.targets[output.target_count++] = {run.map(target), target.pixel, target.activation, target.bf16, stream};
  }
  return output;
}

}  // namespace lgnet
