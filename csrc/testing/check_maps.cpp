// The small passes over maps.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "maps.h"

namespace check {

void maps(Random &random) {
  for (const int64_t numel : {0, 1, 15, 16, 17, 1000}) {
    std::vector<float> values(static_cast<size_t>(numel));
    for (float &value : values) value = static_cast<float>(below(random, 1000));
    const float maximum = numel == 0 ? 0.0f : *std::max_element(values.begin(), values.end());
    CHECK(paikern::map_maximum(values.data(), numel) == maximum);
    auto scaled = values;
    paikern::map_scale(scaled.data(), numel, -3, 0.0f);
    for (size_t i = 0; i < values.size(); ++i) CHECK(scaled[i] == values[i] / 8);
    paikern::through_maximum(scaled.data(), values.data(), numel, 2.0);
  }
  const int64_t outer = 3, channels = 5, inner = 37;
  std::vector<float> y(static_cast<size_t>(outer * channels * inner)), g(y.size());
  for (float &value : y) value = static_cast<float>(below(random, 40) == 0);
  for (float &value : g) value = static_cast<float>(below(random, 3));
  std::vector<uint8_t> live(static_cast<size_t>(channels), 9), wanted(live.size(), 0);
  for (size_t i = 0; i < y.size(); ++i) {
    if (y[i] > 0 && g[i] != 0) wanted[i / static_cast<size_t>(inner) % static_cast<size_t>(channels)] = 1;
  }
  paikern::live_nodes(y.data(), g.data(), outer, channels, inner, live.data());
  CHECK(live == wanted);
}

}  // namespace check
