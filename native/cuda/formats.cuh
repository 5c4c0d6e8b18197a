// The storage formats as the tensor cores read them: how a tile is laid out, packed and unpacked.
//
// A tile is 16 rows of a matrix. It holds, for each step of 64 inputs in order, kStepBytes bytes, and after all steps
// kSuperBytes bytes for each four steps (256 inputs). In a step, lane l = 4r + q of a warp owns inputs 16q … 16q + 15
// of rows r and r + 8: its codes are one or more 16-byte loads, next to those of the other lanes. The step is four
// mma.m16n8k16; input 2P, 2P + 1 of a lane (its "pair" P = 0…7) is the first (P even) or second (P odd) half of the
// fragments of instruction P / 2. Activations use the same order, so a lane reads them as 32 consecutive bytes.
//
// Row i is stored times 2^e[i], which an epilogue takes back. Of floats it puts the largest magnitude into [128, 256):
// neither tiny nor huge weights meet the limits of FP16, and BF16 keeps every bit of what matters beside the row's
// largest value. Codes need scales times 2^24 (codes.cuh); so that FP16 holds these, 2^e[i] puts the row's largest
// scale into [2^-10, 2^-9), or its largest minimum into [32, 64) where that is less. What is lost below FP16's smallest
// numbers is at most 2^-15 of that scale.
//
// kSteps layouts (bytes of a step, then of a super):
//   F16, BF16  2048                                    four 16-byte chunks: the fragments of the instructions
//   F32        4096                                    FP16 head and FP16 rest, each as above
//   Q8_0       1024 codes + 128, 64 scales             one chunk a row
//   Q4_0       512 codes, 64 scales                    two words a row, then two of row r + 8 (codes.cuh)
//   Q4_1       512 codes, 128 scales and minimums
//   Q5_0/Q5_1  as these, 128 more of codes             a third word: a byte of each half for each row
//   Q4_K       512 codes, 64 group scales and minimums | 64 super scales
//   Q5_K       512 codes, 128 more of codes, 64 group scales and minimums | 64
//   Q6_K       512 codes, 256 more of codes, 64 group scales | 32        a third word for each row
#pragma once

#include <cstdint>

#include "cuda/codes.cuh"

namespace tw::cuda {

constexpr int kTileRows = 16;
constexpr int kStepInputs = 64;

// Where a step's bytes are: weights that are read once stay out of L1.
enum class Space { kDevice, kShared };

template <Space kSpace>
__device__ __forceinline__ uint4 load_stream(const void* p) {
  if constexpr (kSpace == Space::kShared) return *static_cast<const uint4*>(p);
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
template <class T, Space kSpace = Space::kDevice>
__device__ __forceinline__ T load_const(const void* p) {
  if constexpr (kSpace == Space::kShared) return *static_cast<const T*>(p);
  return __ldg(static_cast<const T*>(p));
}

// All blocks of the file have an even number of bytes.
__device__ __forceinline__ float read_f16(const uint8_t* p) {
  return __half2float(__ushort_as_half(*reinterpret_cast<const unsigned short*>(p)));
}

// --- Reading the file's blocks, when packing. `row` is the row's first byte, `k` an input, a multiple of 16. ---

// Nibbles of a 32-value block whose byte i holds values i and 16 + i.
__device__ inline LaneCodes half_block_nibbles(const uint8_t* nibbles, int k) {
  LaneCodes codes;
  const int shift = (k & 16) != 0 ? 4 : 0;
  for (int i = 0; i < kLaneInputs; ++i) codes.code[i] = static_cast<uint8_t>(nibbles[i] >> shift & 15);
  return codes;
}
__device__ inline void add_fifth_bits(const uint8_t* bits, int k, LaneCodes* codes) {
  const int first = (k & 16) / 8;
  const uint32_t word = bits[first] | bits[first + 1] << 8;
  for (int i = 0; i < kLaneInputs; ++i) codes->code[i] = static_cast<uint8_t>(codes->code[i] | (word >> i & 1) << 4);
}

// What packing a lane needs: the bytes of rows r and r + 8 (null past the end), its first input, each row's factor.
struct PackLane {
  const uint8_t* row[2];
  float factor[2];
  int k;
  int lane;
  uint8_t* step;   // where the step's bytes go
  uint8_t* super;  // where the bytes of its four steps go
};

__device__ inline void store_scale(uint8_t* at, int lane, int words, int word, float low, float high) {
  const int index = (lane >> 2) * 2 + ((lane & 3) >> 1);  // row r, 32-value block
  reinterpret_cast<uint32_t*>(at)[index * words + word] = pack_half2(low, high);
}

// What a row of codes is stored by, of one scale and minimum: no scale gets to 2^-9, no minimum to 64, which 512 times
// still is a half.
__device__ inline float stored_magnitude(float scale, float minimum) {
  return fmaxf(fabsf(scale) * 131072.0f, fabsf(minimum) * 4.0f);
}

// --- Formats. A row's largest `magnitude`, each of kMagnitudeInputs inputs from k on, is stored in [128, 256);
// `unpack` gives the A fragments of instruction j of a step's four, which with kFragments are loaded registers
// themselves. ---

template <bool kBrain>
struct Float16Format {
  static constexpr int kStepBytes = 2048;
  static constexpr int kSuperBytes = 0;
  static constexpr int kPasses = 1;
  static constexpr bool kFragments = true;
  struct Raw {
    uint4 chunk[4];
  };
  static constexpr int kMagnitudeInputs = 1;
  __device__ static float magnitude(const uint8_t* row, int k) { return fabsf(value(row, k)); }
  __device__ static float value(const uint8_t* row, int k) {
    const unsigned short bits = reinterpret_cast<const unsigned short*>(row)[k];
    return kBrain ? __uint_as_float(static_cast<uint32_t>(bits) << 16) : __half2float(__ushort_as_half(bits));
  }
  __device__ static void pack(const PackLane& p) {
    for (int j = 0; j < 4; ++j) {
      uint32_t words[4];
      for (int i = 0; i < 4; ++i) {
        const int half = i % 2;
        const int k = p.k + 4 * j + i / 2 * 2;
        words[i] = p.row[half] == nullptr
                       ? 0
                       : pack_half2(value(p.row[half], k) * p.factor[half], value(p.row[half], k + 1) * p.factor[half]);
      }
      reinterpret_cast<uint4*>(p.step)[j * 32 + p.lane] = {words[0], words[1], words[2], words[3]};
    }
  }
  template <Space kSpace>
  __device__ __forceinline__ static Raw load(const uint8_t* step, const uint8_t*, int lane) {
    Raw raw;
#pragma unroll
    for (int i = 0; i < 4; ++i) raw.chunk[i] = load_stream<kSpace>(step + i * 512 + lane * 16);
    return raw;
  }
  __device__ __forceinline__ static void unpack(const Raw& raw, int, int, int j, uint32_t (&a)[4]) {
    a[0] = raw.chunk[j].x;
    a[1] = raw.chunk[j].y;
    a[2] = raw.chunk[j].z;
    a[3] = raw.chunk[j].w;
  }
};

struct Float32Format {
  using Half = Float16Format<false>;
  static constexpr int kStepBytes = 4096;
  static constexpr int kSuperBytes = 0;
  static constexpr int kPasses = 2;
  static constexpr bool kFragments = true;
  struct Raw {
    Half::Raw part[2];
  };
  static constexpr int kMagnitudeInputs = 1;
  __device__ static float magnitude(const uint8_t* row, int k) { return fabsf(value(row, k)); }
  __device__ static float value(const uint8_t* row, int k) { return reinterpret_cast<const float*>(row)[k]; }
  __device__ static void pack(const PackLane& p) {
    for (int j = 0; j < 4; ++j) {
      uint32_t head[4], rest[4];
      for (int i = 0; i < 4; ++i) {
        const int half = i % 2;
        float x[2] = {0, 0}, h[2];
        for (int e = 0; e < 2; ++e) {
          if (p.row[half] != nullptr) x[e] = value(p.row[half], p.k + 4 * j + i / 2 * 2 + e) * p.factor[half];
          h[e] = __half2float(__float2half_rn(x[e]));
        }
        head[i] = pack_half2(h[0], h[1]);
        rest[i] = pack_half2(x[0] - h[0], x[1] - h[1]);
      }
      auto* out = reinterpret_cast<uint4*>(p.step) + j * 32 + p.lane;
      out[0] = {head[0], head[1], head[2], head[3]};
      out[128] = {rest[0], rest[1], rest[2], rest[3]};
    }
  }
  template <Space kSpace>
  __device__ __forceinline__ static Raw load(const uint8_t* step, const uint8_t* super, int lane) {
    return {{Half::load<kSpace>(step, super, lane), Half::load<kSpace>(step + 2048, super, lane)}};
  }
  __device__ __forceinline__ static void unpack(const Raw& raw, int lane, int pass, int j, uint32_t (&a)[4]) {
    Half::unpack(raw.part[pass], lane, 0, j, a);
  }
};

struct Q8_0Format {
  static constexpr int kStepBytes = 1088;
  static constexpr int kSuperBytes = 0;
  static constexpr int kPasses = 1;
  static constexpr bool kFragments = false;
  struct Raw {
    uint4 codes[2];
    uint32_t scales;
  };
  static constexpr int kMagnitudeInputs = 32;
  __device__ static float magnitude(const uint8_t* row, int k) {
    return stored_magnitude(read_f16(row + k / 32 * 34), 0.0f);
  }
  __device__ static void pack(const PackLane& p) {
    float scale[2] = {0, 0};
    for (int half = 0; half < 2; ++half) {
      uint32_t words[4] = {0x80808080u, 0x80808080u, 0x80808080u, 0x80808080u};
      if (p.row[half] != nullptr) {
        const uint8_t* block = p.row[half] + p.k / 32 * 34;
        scale[half] = read_f16(block) * p.factor[half] * kOneOverCodeUnit;
        const auto* c = reinterpret_cast<const unsigned short*>(block + 2 + p.k % 32);
        for (int i = 0; i < 4; ++i) words[i] = (c[2 * i] | static_cast<uint32_t>(c[2 * i + 1]) << 16) ^ 0x80808080u;
      }
      reinterpret_cast<uint4*>(p.step)[half * 32 + p.lane] = {words[0], words[1], words[2], words[3]};
    }
    store_scale(p.step + 1024, p.lane, 1, 0, scale[0], scale[1]);
  }
  template <Space kSpace>
  __device__ __forceinline__ static Raw load(const uint8_t* step, const uint8_t*, int lane) {
    Raw raw;
    raw.codes[0] = load_stream<kSpace>(step + lane * 16);
    raw.codes[1] = load_stream<kSpace>(step + 512 + lane * 16);
    raw.scales = load_const<uint32_t, kSpace>(step + 1024 + (lane >> 1) * 4);
    return raw;
  }
  __device__ __forceinline__ static void unpack(const Raw& raw, int, int, int j, uint32_t (&a)[4]) {
    const uint32_t minimums = centering(raw.scales, 128);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t scale = half == 0 ? broadcast_low(raw.scales) : broadcast_high(raw.scales);
      const uint32_t minimum = half == 0 ? broadcast_low(minimums) : broadcast_high(minimums);
      const uint32_t words[4] = {raw.codes[half].x, raw.codes[half].y, raw.codes[half].z, raw.codes[half].w};
      a[half] = scaled(__byte_perm(words[j], 0, 0x4140), scale, minimum);
      a[2 + half] = scaled(__byte_perm(words[j], 0, 0x4342), scale, minimum);
    }
  }
};

// Q4_0, Q4_1, Q5_0 and Q5_1: value = scale · code + minimum, where the symmetric formats have minimum = -scale ·
// middle.
template <bool kFifth, bool kMinimum>
struct NibbleFormat {
  static constexpr int kScaleBytes = kMinimum ? 128 : 64;
  static constexpr int kFifthBytes = kFifth ? 128 : 0;
  static constexpr int kStepBytes = 512 + kFifthBytes + kScaleBytes;
  static constexpr int kSuperBytes = 0;
  static constexpr int kPasses = 1;
  static constexpr bool kFragments = false;
  static constexpr int kHead = kMinimum ? 4 : 2;
  static constexpr int kBlockBytes = kHead + (kFifth ? 4 : 0) + 16;
  static constexpr int kBits = kFifth ? 5 : 4;
  static constexpr uint32_t kMiddle = kFifth ? 16 : 8;
  struct Raw {
    uint4 codes;
    uint32_t more;
    uint2 scales;
  };
  __device__ static LaneCodes codes(const uint8_t* block, int k) {
    LaneCodes result = half_block_nibbles(block + kBlockBytes - 16, k);
    if (kFifth) add_fifth_bits(block + kHead, k, &result);
    return result;
  }
  static constexpr int kMagnitudeInputs = 32;
  __device__ static float magnitude(const uint8_t* row, int k) {
    const uint8_t* block = row + k / 32 * kBlockBytes;
    return stored_magnitude(read_f16(block), kMinimum ? read_f16(block + 2) : 0.0f);
  }
  __device__ static void pack(const PackLane& p) {
    CodeWords row[2] = {};
    float scale[2] = {0, 0};
    float minimum[2] = {0, 0};
    for (int half = 0; half < 2; ++half) {
      if (p.row[half] == nullptr) continue;
      const uint8_t* block = p.row[half] + p.k / 32 * kBlockBytes;
      row[half] = pack_codes<kBits>(codes(block, p.k));
      scale[half] = read_f16(block) * p.factor[half] * kOneOverCodeUnit;
      if (kMinimum) minimum[half] = read_f16(block + 2) * p.factor[half];
    }
    reinterpret_cast<uint4*>(p.step)[p.lane] = {row[0].a, row[0].b, row[1].a, row[1].b};
    if (kFifth) reinterpret_cast<uint32_t*>(p.step + 512)[p.lane] = row[0].c | row[1].c << 8;
    uint8_t* scales = p.step + 512 + kFifthBytes;
    store_scale(scales, p.lane, kMinimum ? 2 : 1, 0, scale[0], scale[1]);
    if (kMinimum) store_scale(scales, p.lane, 2, 1, minimum[0], minimum[1]);
  }
  template <Space kSpace>
  __device__ __forceinline__ static Raw load(const uint8_t* step, const uint8_t*, int lane) {
    Raw raw{};
    raw.codes = load_stream<kSpace>(step + lane * 16);
    if (kFifth) raw.more = load_const<uint32_t, kSpace>(step + 512 + lane * 4);
    const uint8_t* scales = step + 512 + kFifthBytes;
    if (kMinimum) {
      raw.scales = load_const<uint2, kSpace>(scales + (lane >> 1) * 8);
    } else {
      raw.scales.x = load_const<uint32_t, kSpace>(scales + (lane >> 1) * 4);
    }
    return raw;
  }
  __device__ __forceinline__ static void unpack(const Raw& raw, int, int, int j, uint32_t (&a)[4]) {
    const CodeWords rows[2] = {{raw.codes.x, raw.codes.y, raw.more}, {raw.codes.z, raw.codes.w, raw.more >> 8}};
    const uint32_t minimums = kMinimum ? raw.scales.y : centering(raw.scales.x, kMiddle);
    unpack_codes<kBits>(rows, {raw.scales.x, minimums}, j, a);
  }
};

// Group scale and minimum of Q4_K and Q5_K, 6 bits each in 12 bytes (quant/k_groups.h).
__device__ inline void group_scale(const uint8_t* packed, int group, int* scale, int* minimum) {
  if (group < 4) {
    *scale = packed[group] & 63;
    *minimum = packed[group + 4] & 63;
  } else {
    const int low = packed[group + 4];
    *scale = (low & 15) | (packed[group - 4] >> 6) << 4;
    *minimum = (low >> 4) | (packed[group] >> 6) << 4;
  }
}

template <bool kFifth>
struct GroupedFormat {
  static constexpr int kFifthBytes = kFifth ? 128 : 0;
  static constexpr int kStepBytes = 576 + kFifthBytes;
  static constexpr int kSuperBytes = 64;
  static constexpr int kPasses = 1;
  static constexpr bool kFragments = false;
  static constexpr int kBits = kFifth ? 5 : 4;
  static constexpr int kBlockBytes = kFifth ? 176 : 144;
  struct Raw {
    uint4 codes;
    uint32_t more;
    uint32_t groups;  // scale of r, of r + 8, minimum of r, of r + 8
    uint2 supers;     // scales of r and r + 8, scales of the minimums times -1
  };
  __device__ static int code(const uint8_t* block, int i) {
    const int group = i / 32;
    int result = block[kBlockBytes - 128 + group / 2 * 32 + i % 32] >> (group % 2 * 4) & 15;
    if (kFifth) result |= (block[16 + i % 32] >> group & 1) << 4;
    return result;
  }
  static constexpr int kMagnitudeInputs = 32;
  __device__ static float magnitude(const uint8_t* row, int k) {
    const uint8_t* block = row + k / 256 * kBlockBytes;
    int scale, minimum;
    group_scale(block + 4, k % 256 / 32, &scale, &minimum);
    // The super scales themselves must fit too.
    return stored_magnitude(read_f16(block) * static_cast<float>(max(scale, 1)),
                            read_f16(block + 2) * static_cast<float>(max(minimum, 1)));
  }
  __device__ static void pack(const PackLane& p) {
    CodeWords row[2] = {};
    uint32_t groups = 0;
    float super_scale[2] = {0, 0}, super_minimum[2] = {0, 0};
    for (int half = 0; half < 2; ++half) {
      if (p.row[half] == nullptr) continue;
      const uint8_t* block = p.row[half] + p.k / 256 * kBlockBytes;
      LaneCodes codes;
      for (int i = 0; i < kLaneInputs; ++i) codes.code[i] = static_cast<uint8_t>(code(block, p.k % 256 + i));
      row[half] = pack_codes<kBits>(codes);
      int scale, minimum;
      group_scale(block + 4, p.k % 256 / 32, &scale, &minimum);
      groups |= static_cast<uint32_t>(scale) << (8 * half) | static_cast<uint32_t>(minimum) << (16 + 8 * half);
      super_scale[half] = read_f16(block) * p.factor[half] * kOneOverCodeUnit;
      super_minimum[half] = -read_f16(block + 2) * p.factor[half] * 512.0f;
    }
    reinterpret_cast<uint4*>(p.step)[p.lane] = {row[0].a, row[0].b, row[1].a, row[1].b};
    if (kFifth) reinterpret_cast<uint32_t*>(p.step + 512)[p.lane] = row[0].c | row[1].c << 8;
    reinterpret_cast<uint32_t*>(p.step + 512 + kFifthBytes)[p.lane >> 1] = groups;
    reinterpret_cast<uint2*>(p.super)[p.lane >> 2] = {pack_half2(super_scale[0], super_scale[1]),
                                                      pack_half2(super_minimum[0], super_minimum[1])};
  }
  template <Space kSpace>
  __device__ __forceinline__ static Raw load(const uint8_t* step, const uint8_t* super, int lane) {
    Raw raw{};
    raw.codes = load_stream<kSpace>(step + lane * 16);
    if (kFifth) raw.more = load_const<uint32_t, kSpace>(step + 512 + lane * 4);
    raw.groups = load_const<uint32_t, kSpace>(step + 512 + kFifthBytes + (lane >> 1) * 4);
    raw.supers = load_const<uint2, kSpace>(super + (lane >> 2) * 8);
    return raw;
  }
  __device__ __forceinline__ static void unpack(const Raw& raw, int, int, int j, uint32_t (&a)[4]) {
    const CodeWords rows[2] = {{raw.codes.x, raw.codes.y, raw.more}, {raw.codes.z, raw.codes.w, raw.more >> 8}};
    const Scaling scaling = {times(byte_pair(raw.groups), raw.supers.x),
                             times(small_byte_pair(raw.groups), raw.supers.y)};
    unpack_codes<kBits>(rows, scaling, j, a);
  }
};

struct Q6_KFormat {
  static constexpr int kStepBytes = 832;
  static constexpr int kSuperBytes = 32;
  static constexpr int kPasses = 1;
  static constexpr bool kFragments = false;
  static constexpr int kBlockBytes = 210;
  struct Raw {
    uint4 codes;
    uint2 more;
    uint32_t scales;  // of r and r + 8, bytes of 128 more
    uint32_t supers;
  };
  __device__ static int code(const uint8_t* block, int i) {
    const int half = i / 128;
    const int quarter = i % 128 / 32;
    const int low = block[64 * half + 32 * (quarter % 2) + i % 32] >> (quarter < 2 ? 0 : 4) & 15;
    return low | (block[128 + 32 * half + i % 32] >> (2 * quarter) & 3) << 4;
  }
  static constexpr int kMagnitudeInputs = 16;
  __device__ static float magnitude(const uint8_t* row, int k) {
    const uint8_t* block = row + k / 256 * kBlockBytes;
    const int scale = static_cast<int8_t>(block[192 + k % 256 / 16]);
    return stored_magnitude(read_f16(block + 208) * static_cast<float>(max(abs(scale), 1)), 0.0f);
  }
  __device__ static void pack(const PackLane& p) {
    CodeWords row[2] = {};
    uint32_t scales = 0x8080;
    float super[2] = {0, 0};
    for (int half = 0; half < 2; ++half) {
      if (p.row[half] == nullptr) continue;
      const uint8_t* block = p.row[half] + p.k / 256 * kBlockBytes;
      LaneCodes codes;
      for (int i = 0; i < kLaneInputs; ++i) codes.code[i] = static_cast<uint8_t>(code(block, p.k % 256 + i));
      row[half] = pack_codes<6>(codes);
      scales ^= static_cast<uint32_t>(block[192 + p.k % 256 / 16]) << (8 * half);
      super[half] = read_f16(block + 208) * p.factor[half] * kOneOverCodeUnit;
    }
    reinterpret_cast<uint4*>(p.step)[p.lane] = {row[0].a, row[0].b, row[1].a, row[1].b};
    reinterpret_cast<uint2*>(p.step + 512)[p.lane] = {row[0].c, row[1].c};
    reinterpret_cast<uint16_t*>(p.step + 768)[p.lane] = static_cast<uint16_t>(scales);
    reinterpret_cast<uint32_t*>(p.super)[p.lane >> 2] = pack_half2(super[0], super[1]);
  }
  template <Space kSpace>
  __device__ __forceinline__ static Raw load(const uint8_t* step, const uint8_t* super, int lane) {
    Raw raw;
    raw.codes = load_stream<kSpace>(step + lane * 16);
    raw.more = load_const<uint2, kSpace>(step + 512 + lane * 8);
    raw.scales = load_const<uint16_t, kSpace>(step + 768 + lane * 2);
    raw.supers = load_const<uint32_t, kSpace>(super + (lane >> 2) * 4);
    return raw;
  }
  __device__ __forceinline__ static void unpack(const Raw& raw, int, int, int j, uint32_t (&a)[4]) {
    const CodeWords rows[2] = {{raw.codes.x, raw.codes.y, raw.more.x}, {raw.codes.z, raw.codes.w, raw.more.y}};
    const uint32_t scales = times(byte_pair(raw.scales, 0x64806480u), raw.supers);
    unpack_codes<6>(rows, {scales, centering(scales, 32)}, j, a);
  }
};

// The A fragments of all four instructions of a step.
template <class Format>
__device__ __forceinline__ void unpack_step(const typename Format::Raw& raw, int lane, int pass, uint32_t (&a)[4][4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) Format::unpack(raw, lane, pass, j, a[j]);
}

using F32Format = Float32Format;
using F16Format = Float16Format<false>;
using BF16Format = Float16Format<true>;
using Q4_0Format = NibbleFormat<false, false>;
using Q4_1Format = NibbleFormat<false, true>;
using Q5_0Format = NibbleFormat<true, false>;
using Q5_1Format = NibbleFormat<true, true>;
using Q4_KFormat = GroupedFormat<false>;
using Q5_KFormat = GroupedFormat<true>;

}  // namespace tw::cuda
