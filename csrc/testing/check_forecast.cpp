// Where the k-th score of the next round is looked for: what the forecast knows after one, two and three rounds, that
// its band holds what it says, and that nothing it is told makes it lie.
#include <cmath>
#include <functional>
#include <limits>

#include "check.h"
#include "path_rounds.h"

namespace check {
namespace {

using paikern::KthForecast;

struct Band {
  double low, high;

  double middle() const { return 0.5 * (low + high); }
  double reach() const { return 0.5 * (high - low); }
};

Band predict(KthForecast &forecast, int64_t k, int64_t total, int64_t room) {
  Band band;
  forecast.predict(k, total, room, &band.low, &band.high);
  return band;
}

double odds(int64_t k, int64_t total) {
  return std::log2(std::max(static_cast<double>(total - k), 0.5) / std::max(static_cast<double>(k), 0.5));
}

constexpr int64_t kTotal = 1'000'000, kRoom = 100'000;

int64_t kept(int round) { return static_cast<int64_t>(static_cast<double>(kTotal) * std::pow(0.93, round + 1)); }

// After `known` rounds the k-th of a curve over the odds is in the middle, where that many determine the curve.
void curves() {
  const std::function<double(double)> along[3] = {[](double x) { return 7.0 + x; },
                                                  [](double x) { return 3.0 - 2.5 * x; },
                                                  [](double x) { return -40.0 + 1.5 * x - 0.2 * x * x; }};
  for (int n = 0; n < 3; ++n) {
    KthForecast forecast;
    CHECK(std::isnan(predict(forecast, kept(0), kTotal, kRoom).low));
    for (int round = 0; round < 20; ++round) {
      const Band band = predict(forecast, kept(round), kTotal, kRoom);
      const double truth = along[n](odds(kept(round), kTotal));
      // A guess is believed only after it has been near once.
      if (round == 1) CHECK(std::fabs(band.reach() - 0.2) < 1e-12);
      if (n == 0 && round >= 1) CHECK(std::fabs(band.middle() - truth) < 1e-9);
      if (round >= 2 + n) CHECK(std::fabs(band.middle() - truth) < 1e-9 && band.reach() < 0.011);
      forecast.observe(truth, -1);
    }
    forecast.observe(std::numeric_limits<double>::quiet_NaN(), -1);
    CHECK(std::isnan(predict(forecast, kept(20), kTotal, kRoom).low));
  }
}

// Rounds over scores whose logarithm to base 2 is distributed as `quantile` says: the band is no wider than there is
// room for, and nearly always holds the k-th.
void distributions() {
  const auto exponential = [](double upper) { return std::log2(-std::log(upper)); };
  const auto pareto = [](double upper) { return -0.7 * std::log2(upper); };
  const auto logistic = [](double upper) { return std::log2(1.0 / upper - 1.0); };
  for (const std::function<double(double)> &quantile :
       {std::function<double(double)>(exponential), std::function<double(double)>(pareto),
        std::function<double(double)>(logistic)}) {
    const auto larger = [&](double bound) {  // the fraction of scores above 2**bound
      double few = 1e-12, most = 1.0 - 1e-12;
      for (int i = 0; i < 60; ++i) (quantile(0.5 * (few + most)) > bound ? few : most) = 0.5 * (few + most);
      return few;
    };
    KthForecast forecast;
    int misses = 0;
    for (int round = 0; round < 60; ++round) {
      const Band band = predict(forecast, kept(round), kTotal, kRoom);
      const double kth = quantile(static_cast<double>(kept(round)) / static_cast<double>(kTotal));
      if (round == 0) {
        forecast.observe(kth, -1);
        continue;
      }
      const auto inside = static_cast<int64_t>(static_cast<double>(kTotal) * (larger(band.low) - larger(band.high)));
      CHECK(round < 3 || inside <= kRoom);
      misses += !(band.low <= kth && kth <= band.high) || inside > kRoom;
      forecast.observe(kth, inside);
    }
    CHECK(misses <= 4);
  }
}

// Whatever it is told, jumps, repeated counts, zeros and infinities, a band is a band or nothing.
void anything(Random &random) {
  KthForecast forecast;
  for (int round = 0; round < 40; ++round) {
    const int64_t k = pick<int64_t>(random, {0, 1, 500, 500, 999, 1000, below(random, 1001)});
    const Band band = predict(forecast, k, 1000, 65'536);
    CHECK(!(band.low > band.high));
    const double some = static_cast<double>(below(random, 4001) - 2000) / 7.0;
    const double log2_kth = pick<double>(random, {some, some, some, -INFINITY, INFINITY, NAN});
    forecast.observe(log2_kth, std::isnan(band.low) ? -1 : pick<int64_t>(random, {-1, 0, 1, below(random, 1001)}));
  }
  // And it finds its way back.
  for (int round = 0; round < 12; ++round) {
    predict(forecast, kept(round), kTotal, kRoom);
    forecast.observe(odds(kept(round), kTotal), 1000);
  }
  const Band band = predict(forecast, kept(12), kTotal, kRoom);
  const double truth = odds(kept(12), kTotal);
  CHECK(band.low <= truth && truth <= band.high);
}

}  // namespace

void forecast(Random &random, int rounds) {
  curves();
  distributions();
  for (int round = 0; round < rounds; ++round) anything(random);
}

}  // namespace check
