// Order (W-21): penalties and bias on the raw logits, tokens outside the mask weigh nothing, temperature, top-k,
// softmax, top-p (keeping the token that crosses it), min-p, draw; ties go to the lower id.
//
// Probabilities are compared and summed as integers: a token's weight is ⌊e^(scaled - max) · 2^44⌋, so every sum is
// exact and no order of summation, grid or block matters. A key is the logit's bits in an order-preserving form, then
// the complement of the id, so "most probable first, ties to the lower id" is "larger keys first". Top-k, top-p and the
// draw among filtered tokens each look for the largest key down to which enough tokens, or enough weight, have been
// seen.
#include "cuda/sampler.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/error.h"
#include "core/philox.h"
#include "cuda/launch.h"

namespace tw::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kRun = 1024;  // ids whose weights are summed together for an unfiltered draw
constexpr int kGreedyThreads = 256;
constexpr int kGreedyChunk = 4096;

// The logit of a token outside the mask: finite, and so low that its weight is exactly 0.
constexpr float kForbidden = -1e30f;

using Mass = unsigned long long;

// A job as the device sees it; the lists lie behind all jobs.
struct DeviceJob {
  float temperature, top_p, min_p;
  float repetition_penalty, frequency_penalty, presence_penalty;
  int32_t top_k, num_logprobs;
  int32_t first_penalty, num_penalties;  // (id, count) pairs
  int32_t first_bias, num_biases;        // (id, bias) pairs
  int32_t mask;                          // its place among the masks, or -1
  uint64_t random;                       // 53 random bits
};

struct ListEntry {
  int32_t id;
  int32_t count;  // of a generated token
  float bias;
  float original;  // the raw logit, kept by the device
};

struct SampleTask {
  float* logits;
  int64_t stride;
  int32_t vocab_size;
  const DeviceJob* jobs;
  ListEntry* entries;
  const uint32_t* masks;  // [masks, ⌈vocab_size / 32⌉]
  Mass* candidates;       // [jobs, vocab_size]
  DeviceSample* results;
  int32_t* drawn;  // [jobs]
};

__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x == 0.0f ? 0.0f : x);  // -0 ties with +0
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(uint32_t key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}
__device__ __forceinline__ Mass key_of(float logit, int id) {
  return static_cast<Mass>(ordered(logit)) << 32 | static_cast<uint32_t>(~id);
}
__device__ __forceinline__ int id_of(Mass key) { return static_cast<int>(~static_cast<uint32_t>(key)); }
__device__ __forceinline__ float logit_of(Mass key) { return from_ordered(static_cast<uint32_t>(key >> 32)); }
__device__ __forceinline__ bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

__device__ __forceinline__ Mass weight_of(float logit, float max, float scale) {
  return static_cast<Mass>(expf(__fmul_rn(__fsub_rn(logit, max), scale)) * 0x1.0p44f);
}

__device__ __forceinline__ Mass shuffle_xor(Mass value, int mask) { return __shfl_xor_sync(~0u, value, mask); }

struct SumOp {
  __device__ Mass operator()(Mass a, Mass b) const { return a + b; }
};
struct MaxOp {
  __device__ Mass operator()(Mass a, Mass b) const { return a > b ? a : b; }
};

// The combination of all threads' values, in all threads.
template <class Op>
__device__ Mass reduce(Mass value, Mass* scratch, Op op) {
  for (int offset = 16; offset > 0; offset /= 2) value = op(value, shuffle_xor(value, offset));
  __syncthreads();
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = value;
  __syncthreads();
  value = scratch[threadIdx.x & 31];
  for (int offset = 16; offset > 0; offset /= 2) value = op(value, shuffle_xor(value, offset));
  return value;
}

// --- Greedy rows without lists: two kernels over all of the device. ---

__global__ void __launch_bounds__(kGreedyThreads)
    greedy_chunks_kernel(const float* logits, int64_t stride, int32_t vocab_size, Mass* partials) {
  __shared__ Mass scratch[kGreedyThreads / 32];
  release_successor();
  await_predecessor();
  const float* row = logits + blockIdx.y * stride;
  const int begin = static_cast<int>(blockIdx.x) * kGreedyChunk;
  const int end = min(begin + kGreedyChunk, vocab_size);
  Mass best = 0;
  for (int id = begin + static_cast<int>(threadIdx.x); id < end; id += kGreedyThreads) {
    const float x = row[id];
    best = max(best, is_finite(x) ? key_of(x, id) : ~Mass{0});
  }
  for (int offset = 16; offset > 0; offset /= 2) best = max(best, shuffle_xor(best, offset));
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = best;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kGreedyThreads / 32; ++i) best = max(best, scratch[i]);
  partials[blockIdx.y * gridDim.x + blockIdx.x] = best;
}

__global__ void greedy_kernel(const Mass* partials, int num_chunks, DeviceSample* results, int32_t* drawn) {
  await_predecessor();
  Mass best = 0;
  for (int i = static_cast<int>(threadIdx.x); i < num_chunks; i += 32) {
    best = max(best, partials[blockIdx.x * static_cast<unsigned>(num_chunks) + static_cast<unsigned>(i)]);
  }
  for (int offset = 16; offset > 0; offset /= 2) best = max(best, shuffle_xor(best, offset));
  if (threadIdx.x != 0) return;
  results[blockIdx.x].finite = best != ~Mass{0};
  results[blockIdx.x].id = drawn[blockIdx.x] = best == ~Mass{0} ? 0 : id_of(best);
}

// --- Any row: one block each. ---

class RowSampler {
 public:
  __device__ RowSampler(const SampleTask& task, Mass* scratch)
      : task_(task),
        job_(task.jobs[blockIdx.x]),
        scratch_(scratch),
        logits_(task.logits + blockIdx.x * task.stride),
        candidates_(task.candidates + static_cast<int64_t>(blockIdx.x) * task.vocab_size) {}

  __device__ void run(Mass* runs) {
    DeviceSample& result = task_.results[blockIdx.x];
    const int thread = static_cast<int>(threadIdx.x);
    Mass top = largest_below(~Mass{0});
    if (top == ~Mass{0}) return fail();
    double log_sum = 0;
    const float raw_max = logit_of(top);
    if (job_.num_logprobs >= 0) {
      const Mass total = mass_of_all(raw_max, 1.0f);
      log_sum = log(static_cast<double>(total) * 0x1.0p-44);
      Mass below = ~Mass{0} - 1;
      const int wanted = min(job_.num_logprobs, task_.vocab_size);
      for (int i = 0; i < wanted; ++i) {
        const Mass key = largest_below(below);
        if (thread == 0) {
          result.top_ids[i] = id_of(key);
          result.top_logprobs[i] = logprob(logit_of(key), raw_max, log_sum);
        }
        below = key;
      }
      if (thread == 0) result.num_top = wanted;
    }
    apply_lists();
    if (job_.mask >= 0) forbid();
    if (job_.num_penalties + job_.num_biases > 0 || job_.mask >= 0) {
      top = largest_below(~Mass{0});
      if (top == ~Mass{0}) return fail();
    }
    const int id = job_.temperature == 0.0f ? id_of(top) : draw(logit_of(top), runs);
    if (thread == 0) {
      result.id = task_.drawn[blockIdx.x] = id;
      result.finite = 1;
      if (job_.num_logprobs >= 0) result.logprob = logprob(raw_logit(id), raw_max, log_sum);
    }
  }

 private:
  __device__ void fail() {
    if (threadIdx.x == 0) {
      task_.results[blockIdx.x].finite = 0;
      task_.results[blockIdx.x].id = task_.drawn[blockIdx.x] = 0;
    }
  }
  __device__ static float logprob(float logit, float max, double log_sum) {
    return static_cast<float>(static_cast<double>(logit - max) - log_sum);
  }

  // The largest key below `bound`; all ones if a logit is not finite.
  __device__ Mass largest_below(Mass bound) {
    Mass best = 0;
    for (int id = static_cast<int>(threadIdx.x); id < task_.vocab_size; id += kThreads) {
      const float x = logits_[id];
      const Mass key = is_finite(x) ? key_of(x, id) : ~Mass{0};
      if (key < bound || key == ~Mass{0}) best = max(best, key);
    }
    return reduce(best, scratch_, MaxOp());
  }

  __device__ Mass mass_of_all(float max, float scale) {
    Mass sum = 0;
    for (int id = static_cast<int>(threadIdx.x); id < task_.vocab_size; id += kThreads) {
      sum += weight_of(logits_[id], max, scale);
    }
    return reduce(sum, scratch_, SumOp());
  }

  __device__ void apply_lists() {
    ListEntry* penalties = task_.entries + job_.first_penalty;
    ListEntry* biases = task_.entries + job_.first_bias;
    for (int i = static_cast<int>(threadIdx.x); i < job_.num_penalties; i += kThreads) {
      penalties[i].original = logits_[penalties[i].id];
    }
    for (int i = static_cast<int>(threadIdx.x); i < job_.num_biases; i += kThreads) {
      biases[i].original = logits_[biases[i].id];
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < job_.num_penalties; i += kThreads) {
      float value = penalties[i].original;
      value = value > 0.0f ? __fdiv_rn(value, job_.repetition_penalty) : __fmul_rn(value, job_.repetition_penalty);
      value = __fsub_rn(value, __fmul_rn(job_.frequency_penalty, static_cast<float>(penalties[i].count)));
      logits_[penalties[i].id] = __fsub_rn(value, job_.presence_penalty);
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < job_.num_biases; i += kThreads) {
      logits_[biases[i].id] = __fadd_rn(logits_[biases[i].id], biases[i].bias);
    }
    __syncthreads();
  }

  // Leaves the tokens of the mask alone to be drawn.
  __device__ void forbid() {
    const uint32_t* words = task_.masks + static_cast<int64_t>(job_.mask) * ((task_.vocab_size + 31) / 32);
    for (int id = static_cast<int>(threadIdx.x); id < task_.vocab_size; id += kThreads) {
      if ((words[id / 32] >> (id % 32) & 1) == 0) logits_[id] = kForbidden;
    }
    __syncthreads();
  }

  // The logit of an allowed token before the lists were applied. Thread 0 alone.
  __device__ float raw_logit(int id) const {
    if (threadIdx.x != 0) return 0;
    const ListEntry* lists[2] = {task_.entries + job_.first_penalty, task_.entries + job_.first_bias};
    const int counts[2] = {job_.num_penalties, job_.num_biases};
    for (int list = 0; list < 2; ++list) {
      for (int i = 0; i < counts[list]; ++i) {
        if (lists[list][i].id == id) return lists[list][i].original;
      }
    }
    return logits_[id];
  }

  // ⌊random · total / 2^53⌋
  __device__ Mass target_of(Mass total) const { return __umul64hi(job_.random << 11, total); }

  __device__ int draw(float max, Mass* runs) {
    const float scale = __fdiv_rn(1.0f, job_.temperature);
    const bool use_top_k = job_.top_k > 0 && job_.top_k < task_.vocab_size;
    if (use_top_k || job_.top_p < 1.0f || job_.min_p > 0.0f) return draw_filtered(max, scale, use_top_k);
    return draw_any(max, scale, runs);
  }

  // The first id, in order, with which the weights exceed the target.
  __device__ int draw_any(float max, float scale, Mass* runs) {
    const int warp = static_cast<int>(threadIdx.x) >> 5;
    const int lane = static_cast<int>(threadIdx.x) & 31;
    const int num_runs = (task_.vocab_size + kRun - 1) / kRun;
    Mass total = 0;
    for (int run = warp; run < num_runs; run += kWarps) {
      Mass sum = 0;
      for (int id = run * kRun + lane; id < min((run + 1) * kRun, task_.vocab_size); id += 32) {
        sum += weight_of(logits_[id], max, scale);
      }
      for (int offset = 16; offset > 0; offset /= 2) sum += shuffle_xor(sum, offset);
      if (lane == 0) {
        runs[run] = sum;
        total += sum;
      }
    }
    total = reduce(total, scratch_, SumOp());
    __syncthreads();
    const Mass target = target_of(total);
    int run = 0;
    Mass reached = 0;
    while (run + 1 < num_runs && reached + runs[run] <= target) reached += runs[run++];
    int found = 0;
    if (warp == 0) {
      for (int base = run * kRun;; base += 32) {
        const int id = base + lane;
        const Mass weight = id < task_.vocab_size ? weight_of(logits_[id], max, scale) : 0;
        Mass prefix = weight;
        for (int offset = 1; offset < 32; offset *= 2) {
          const Mass before = __shfl_up_sync(~0u, prefix, offset);
          if (lane >= offset) prefix += before;
        }
        const unsigned beyond = __ballot_sync(~0u, reached + prefix > target);
        if (beyond != 0) {
          found = base + __ffs(static_cast<int>(beyond)) - 1;
          break;
        }
        reached += __shfl_sync(~0u, prefix, 31);
        if (base + 32 >= task_.vocab_size) break;
      }
    }
    return found;
  }

  // Candidates with a logit of at least `floor`, in no order; their number and their weight.
  __device__ int collect(float floor, float max, float scale, Mass* mass) {
    __shared__ int count;
    __syncthreads();
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    Mass sum = 0;
    for (int id = static_cast<int>(threadIdx.x); id < task_.vocab_size; id += kThreads) {
      const float x = logits_[id];
      if (x < floor) continue;
      candidates_[atomicAdd(&count, 1)] = key_of(x, id);
      sum += weight_of(x, max, scale);
    }
    *mass = reduce(sum, scratch_, SumOp());
    return count;
  }

  // The largest key K such that candidates ≥ K number at least `needed` (mass = false) or weigh at least `needed`.
  __device__ Mass find_key(int count, Mass needed, bool mass, float max, float scale) {
    Mass low = 0;          // satisfies
    Mass high = ~Mass{0};  // does not
    while (high - low > 1) {
      const Mass middle = low + (high - low) / 2;
      Mass sum = 0;
      for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
        const Mass key = candidates_[i];
        if (key >= middle) sum += mass ? weight_of(logit_of(key), max, scale) : 1;
      }
      sum = reduce(sum, scratch_, SumOp());
      if (sum >= needed) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // Drops candidates below the key; returns how many stay and their weight.
  __device__ int keep_from(Mass key, int count, float max, float scale, Mass* mass) {
    __shared__ int kept;
    __syncthreads();
    if (threadIdx.x == 0) kept = 0;
    __syncthreads();
    Mass sum = 0;
    for (int base = 0; base < count; base += kThreads) {
      const int i = base + static_cast<int>(threadIdx.x);
      const Mass candidate = i < count ? candidates_[i] : 0;
      __syncthreads();  // all of this stretch is read before any of it is overwritten
      if (i < count && candidate >= key) {
        candidates_[atomicAdd(&kept, 1)] = candidate;
        sum += weight_of(logit_of(candidate), max, scale);
      }
      __syncthreads();
    }
    *mass = reduce(sum, scratch_, SumOp());
    return kept;
  }

  __device__ int draw_filtered(float max, float scale, bool use_top_k) {
    Mass all = 0;
    if (job_.top_p < 1.0f && !use_top_k) all = mass_of_all(max, scale);
    const auto share = [&](Mass total) {
      return static_cast<Mass>(static_cast<double>(job_.top_p) * static_cast<double>(total));
    };
    // Only tokens near the top can be kept: look further down only if they are not enough.
    Mass mass = 0;
    int count = 0;
    float depth = 8.0f;
    for (;; depth *= 2) {
      const float floor = depth > 100.0f ? -INFINITY : __fsub_rn(max, __fmul_rn(depth, job_.temperature));
      count = collect(floor, max, scale, &mass);
      if (count == task_.vocab_size) break;
      if (use_top_k ? count >= job_.top_k : job_.top_p < 1.0f ? mass >= share(all) : false) break;
      if (!use_top_k && job_.top_p >= 1.0f && depth > -logf(job_.min_p) + 1.0f) break;
    }
    if (use_top_k) {
      count = keep_from(find_key(count, static_cast<Mass>(job_.top_k), false, max, scale), count, max, scale, &mass);
      all = mass;
    }
    if (job_.top_p < 1.0f) {
      const Mass needed = share(all) > 0 ? share(all) : 1;
      count = keep_from(find_key(count, needed, true, max, scale), count, max, scale, &mass);
    }
    if (job_.min_p > 0.0f) {
      // The heaviest candidate weighs 2^44, and a weight grows with its key: keep down to the last that is heavy
      // enough.
      const auto least = static_cast<Mass>(job_.min_p * 0x1.0p44f);
      Mass lowest = ~Mass{0};
      for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
        const Mass key = candidates_[i];
        if (weight_of(logit_of(key), max, scale) >= least) lowest = min(lowest, key);
      }
      lowest = ~reduce(~lowest, scratch_, MaxOp());
      count = keep_from(lowest, count, max, scale, &mass);
    }
    return id_of(find_key(count, target_of(mass) + 1, true, max, scale));
  }

  const SampleTask& task_;
  const DeviceJob& job_;
  Mass* scratch_;
  float* logits_;
  Mass* candidates_;
};

__global__ void __launch_bounds__(kThreads) sample_kernel(const __grid_constant__ SampleTask task) {
  extern __shared__ Mass runs[];  // one for each kRun ids
  __shared__ Mass scratch[kWarps];
  await_predecessor();
  RowSampler(task, scratch).run(runs);
}

uint64_t random_bits(uint64_t seed, uint64_t index) {
  return static_cast<uint64_t>(uniform_draw(seed, index) * 0x1.0p53);
}

bool is_plain_greedy(const SampleJob& job) {
  const SamplingParams& params = *job.params;
  return params.temperature == 0.0f && params.num_logprobs < 0 && !params.has_penalties() &&
         params.logit_bias.empty() && job.mask == nullptr;
}

}  // namespace

Sampler::Sampler(MemoryTracker* tracker, int32_t max_rows, int32_t vocab_size)
    : vocab_size_(vocab_size), tracker_(tracker) {
  const int32_t chunks = (vocab_size + kGreedyChunk - 1) / kGreedyChunk;
  const auto rows = static_cast<size_t>(max_rows);
  for (auto& slot : slots_) slot = std::make_unique<Slot>(max_rows);
  drawn_ = DeviceBuffer(tracker, Purpose::kWorkspace, rows * sizeof(int32_t));
  partials_ = DeviceBuffer(tracker, Purpose::kWorkspace, rows * static_cast<size_t>(chunks) * sizeof(Mass));
  candidates_ = DeviceBuffer(tracker, Purpose::kWorkspace, rows * static_cast<size_t>(vocab_size) * sizeof(Mass));
}

size_t Sampler::upload(const std::vector<SampleJob>& jobs, Slot* slot, cudaStream_t stream) {
  const auto mask_words = static_cast<size_t>((vocab_size_ + 31) / 32);
  size_t num_entries = 0;
  size_t num_masks = 0;
  for (const SampleJob& job : jobs) {
    if (job.mask != nullptr) ++num_masks;
    if (job.params->has_penalties()) num_entries += job.generated->size();
    num_entries += job.params->logit_bias.size();
  }
  const size_t bytes =
      jobs.size() * sizeof(DeviceJob) + num_entries * sizeof(ListEntry) + num_masks * mask_words * sizeof(uint32_t);
  const size_t room = std::max<size_t>(2 * bytes, 65536);
  if (bytes > slot->staging.size()) slot->staging = PinnedBuffer(room);
  if (bytes > jobs_.size()) jobs_ = DeviceBuffer(tracker_, Purpose::kWorkspace, room);
  auto* device_jobs = slot->staging.as<DeviceJob>();
  auto* entries = reinterpret_cast<ListEntry*>(device_jobs + jobs.size());
  auto* masks = reinterpret_cast<uint32_t*>(entries + num_entries);
  int32_t next = 0;
  int32_t next_mask = 0;
  for (size_t i = 0; i < jobs.size(); ++i) {
    const SamplingParams& params = *jobs[i].params;
    DeviceJob& job = device_jobs[i];
    job = {params.temperature,
           params.top_p,
           params.min_p,
           params.repetition_penalty,
           params.frequency_penalty,
           params.presence_penalty,
           params.top_k,
           params.num_logprobs,
           next,
           0,
           0,
           0,
           -1,
           random_bits(params.seed, jobs[i].token_index)};
    if (params.has_penalties()) {
      for (const TokenCount& token : *jobs[i].generated) entries[next++] = {token.id, token.count, 0, 0};
    }
    job.num_penalties = next - job.first_penalty;
    job.first_bias = next;
    for (const auto& [id, bias] : params.logit_bias) entries[next++] = {id, 0, bias, 0};
    job.num_biases = next - job.first_bias;
    if (jobs[i].mask != nullptr) {
      job.mask = next_mask++;
      std::copy_n(jobs[i].mask, mask_words, masks + static_cast<size_t>(job.mask) * mask_words);
    }
  }
  TW_CUDA_CHECK(
      cudaMemcpyAsync(jobs_.as<uint8_t>(), slot->staging.as<uint8_t>(), bytes, cudaMemcpyHostToDevice, stream));
  return num_entries;
}

void Sampler::draw(float* logits, int64_t stride, const std::vector<SampleJob>& jobs, cudaStream_t stream) {
  Slot* const slot = slots_[num_draws_ % slots_.size()].get();
  slot->num_logprobs.clear();
  for (const SampleJob& job : jobs) slot->num_logprobs.push_back(job.params->num_logprobs);
  auto* const found = slot->results.as<DeviceSample>();
  const auto rows = static_cast<unsigned>(jobs.size());
  if (jobs.empty()) {
    ++num_draws_;
    return;
  }
  if (std::all_of(jobs.begin(), jobs.end(), is_plain_greedy)) {
    const int chunks = (vocab_size_ + kGreedyChunk - 1) / kGreedyChunk;
    launch(greedy_chunks_kernel, dim3(static_cast<unsigned>(chunks), rows), dim3(kGreedyThreads), 0, stream, logits,
           stride, vocab_size_, partials_.as<Mass>());
    launch(greedy_kernel, dim3(rows), dim3(32), 0, stream, partials_.as<Mass>(), chunks, found, drawn_.as<int32_t>());
  } else {
    const size_t num_entries = upload(jobs, slot, stream);
    auto* device_entries = reinterpret_cast<ListEntry*>(jobs_.as<DeviceJob>() + jobs.size());
    const SampleTask task = {logits,
                             stride,
                             vocab_size_,
                             jobs_.as<DeviceJob>(),
                             device_entries,
                             reinterpret_cast<const uint32_t*>(device_entries + num_entries),
                             candidates_.as<Mass>(),
                             found,
                             drawn_.as<int32_t>()};
    const size_t shared = static_cast<size_t>((vocab_size_ + kRun - 1) / kRun) * sizeof(Mass);
    launch(sample_kernel, dim3(rows), dim3(kThreads), shared, stream, task);
  }
  slot->done.record(stream);
  ++num_draws_;
}

void Sampler::take(std::vector<SampleResult>* results) {
  const Slot& slot = *slots_[num_taken_ % slots_.size()];
  ++num_taken_;
  results->assign(slot.num_logprobs.size(), {});
  if (results->empty()) return;
  slot.done.synchronize();
  const auto* found = slot.results.as<DeviceSample>();
  for (size_t i = 0; i < results->size(); ++i) {
    SampleResult& result = (*results)[i];
    result.finite = found[i].finite != 0;
    result.id = found[i].id;
    if (!result.finite || slot.num_logprobs[i] < 0) continue;
    result.logprob = found[i].logprob;
    for (int32_t t = 0; t < found[i].num_top; ++t) {
      result.top.push_back({found[i].top_ids[t], found[i].top_logprobs[t]});
    }
  }
}

}  // namespace tw::cuda
