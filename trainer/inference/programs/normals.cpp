// The noise of a chunk, as trainer/inference/model/noise.py defines it: Philox4x32-10, then Box and Muller, by the vector functions
// that compiled steps use. Nothing here depends on a model.
//
// Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

#include <ATen/cpu/vec/vec.h>
#include <cstdint>

namespace {

constexpr int64_t kQuads = 256;  // that are made at once
constexpr uint32_t kRowStream = 1u << 31;

struct Words {
  uint32_t word[4][kQuads];
};

void philox(Words& counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
#pragma omp simd
    for (int64_t i = 0; i < kQuads; ++i) {
      const uint64_t one = uint64_t(counter.word[0][i]) * 0xD2511F53u, two = uint64_t(counter.word[2][i]) * 0xCD9E8D57u;
      counter.word[0][i] = uint32_t(two >> 32) ^ counter.word[1][i] ^ key0;
      counter.word[1][i] = uint32_t(two);
      counter.word[2][i] = uint32_t(one >> 32) ^ counter.word[3][i] ^ key1;
      counter.word[3][i] = uint32_t(one);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

template <typename T>
void box_muller(const Words& words, T* normal) {  // [4][kQuads]
  using Vec = at::vec::Vectorized<T>;
  T uniform[4][kQuads];
  for (int w = 0; w < 4; ++w) {
#pragma omp simd
    for (int64_t i = 0; i < kQuads; ++i) {
      uniform[w][i] = (T(words.word[w][i]) + T(0.5)) * T(2.3283064365386963e-10);
    }
  }
  for (int pair = 0; pair < 2; ++pair) {
    for (int64_t i = 0; i < kQuads; i += Vec::size()) {
      const Vec radius = (Vec(T(-2.0)) * Vec::loadu(&uniform[2 * pair][i]).log()).sqrt();
      const Vec angle = Vec(T(6.283185307179586)) * Vec::loadu(&uniform[2 * pair + 1][i]);
      (radius * angle.cos()).store(&normal[(2 * pair) * kQuads + i]);
      (radius * angle.sin()).store(&normal[(2 * pair + 1) * kQuads + i]);
    }
  }
}

// out [steps, draws, rows, count]; row_id [steps, groups, rows] has the rows of draws / groups draws each, or is null.
template <typename T>
void fill(int64_t seed, int64_t first, int64_t steps, int64_t draws, int64_t groups, int64_t rows, int64_t count,
          const int64_t* draw, const int64_t* row_id, int64_t threads, T* out) {
  const int64_t quads = (count + 3) / 4, total = steps * draws * rows * quads, blocks = (total + kQuads - 1) / kQuads;
#pragma omp parallel for num_threads(threads) if (blocks > 1 && threads > 1)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t start = block * kQuads, stop = start + kQuads < total ? start + kQuads : total;
    Words words{};
    int64_t item = start / quads, quad = start % quads;
    for (int64_t at = start; at < stop; ++at) {
      const int64_t k = item / (draws * rows), d = item / rows % draws, step = first + k, i = at - start;
      if (row_id == nullptr) {
        words.word[0][i] = uint32_t(quad);
        words.word[1][i] = uint32_t(step >> 32);
        words.word[3][i] = uint32_t(draw[d]);
      } else {
        const int64_t row = row_id[(k * groups + d / (draws / groups)) * rows + item % rows];
        words.word[0][i] = uint32_t(row);
        words.word[1][i] = uint32_t(((row >> 32) & 0xFFFF) | (quad << 16));
        words.word[3][i] = uint32_t(draw[d]) | kRowStream;
      }
      words.word[2][i] = uint32_t(step);
      if (++quad == quads) quad = 0, ++item;
    }
    philox(words, uint32_t(seed), uint32_t(seed >> 32));
    T normal[4 * kQuads];
    box_muller<T>(words, normal);
    item = start / quads, quad = start % quads;
    for (int64_t at = start; at < stop; ++at) {
      const int64_t left = count - 4 * quad;
      T* place = out + item * count + 4 * quad;
      for (int64_t e = 0; e < 4 && e < left; ++e) place[e] = normal[e * kQuads + at - start];
      if (++quad == quads) quad = 0, ++item;
    }
  }
}

}  // namespace

extern "C" void normals32(int64_t seed, int64_t first, int64_t steps, int64_t draws, int64_t groups, int64_t rows,
                          int64_t count, const int64_t* draw, const int64_t* row_id, int64_t threads, float* out) {
  fill<float>(seed, first, steps, draws, groups, rows, count, draw, row_id, threads, out);
}

extern "C" void normals64(int64_t seed, int64_t first, int64_t steps, int64_t draws, int64_t groups, int64_t rows,
                          int64_t count, const int64_t* draw, const int64_t* row_id, int64_t threads, double* out) {
  fill<double>(seed, first, steps, draws, groups, rows, count, draw, row_id, threads, out);
}
