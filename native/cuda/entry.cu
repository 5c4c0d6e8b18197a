// The entry points of libtokenwire_cuda.so that make backends and test kernels; device.cu has the probe.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

#include "core/error.h"
#include "cuda/activations.h"
#include "cuda/check.h"
#include "cuda/cuda_backend.h"
#include "cuda/matmul.h"
#include "cuda/memory.h"
#include "cuda/ops.h"
#include "cuda/packed_matrix.h"
#include "cuda/probe.h"

namespace {

using tw::cuda::DeviceBuffer;
using tw::cuda::Purpose;

void report(TwCudaFailure* failure, tw::ErrorCode code, const char* message) {
  std::snprintf(failure->code, sizeof failure->code, "%s", tw::to_string(code));
  std::snprintf(failure->message, sizeof failure->message, "%s", message);
}

// No exception leaves a C function.
template <class Body>
bool guarded(TwCudaFailure* failure, const Body& body) {
  try {
    body();
    return true;
  } catch (const tw::Error& error) {
    report(failure, error.code(), error.what());
  } catch (const std::exception& error) {
    report(failure, tw::ErrorCode::kInternal, error.what());
  }
  return false;
}

constexpr size_t kGuardBytes = 4096;
constexpr uint8_t kGuard = 0xA5;

int64_t padded(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

void run_matmul_test(TwCudaMatmulTest* test) {
  tw::cuda::MemoryTracker tracker(0);
  TW_CUDA_CHECK(cudaSetDevice(0));
  const tw::cuda::Stream stream;
  const auto dtype = static_cast<tw::DType>(test->dtype);
  const tw::MatrixSource source = {dtype, test->num_rows, test->num_cols, test->weights};
  tw::cuda::Packer packer(&tracker, /*keeps_formats=*/true);
  std::vector<float> bias;
  if (test->bias != nullptr) bias.assign(test->bias, test->bias + test->num_rows);
  const tw::cuda::PackedMatrix matrix =
      test->up == nullptr ? packer.pack_matrix({source}, bias)
                          : packer.pack_gate_up(source, {dtype, test->num_rows, test->num_cols, test->up});

  const int64_t stride = padded(test->num_cols, 64);
  const auto tokens = static_cast<size_t>(test->num_tokens);
  const bool tiled = test->kernel < 0 ? tw::cuda::takes_tiles(matrix.parts.at(0), test->num_tokens) : test->kernel != 0;
  std::vector<float> rows(tokens * static_cast<size_t>(stride));
  std::vector<__half> halves(static_cast<size_t>(padded(test->num_tokens, tw::cuda::kTokenPadding) * stride));
  std::vector<uint32_t> magnitudes(tokens);
  for (size_t t = 0; t < tokens; ++t) {
    float largest = 0;
    for (int64_t k = 0; k < test->num_cols; ++k) {
      const float x = test->inputs[static_cast<int64_t>(t) * test->num_cols + k];
      const auto at = t * static_cast<size_t>(stride) + static_cast<size_t>(k);
      rows[at] = x;
      const int64_t pair = tw::cuda::pair_offset(tiled, static_cast<int64_t>(t), k / 2 * 2, stride);
      halves[static_cast<size_t>(pair + k % 2)] = __float2half_rn(x);
      largest = std::max(largest, std::abs(x));
    }
    std::memcpy(&magnitudes[t], &largest, sizeof largest);
  }
  const auto upload = [&](const void* data, size_t bytes) {
    DeviceBuffer buffer(&tracker, Purpose::kWorkspace, bytes);
    TW_CUDA_CHECK(cudaMemcpy(buffer.as<uint8_t>(), data, bytes, cudaMemcpyHostToDevice));
    return buffer;
  };
  const DeviceBuffer device_rows = upload(rows.data(), rows.size() * sizeof(float));
  const DeviceBuffer device_halves = upload(halves.data(), halves.size() * sizeof(__half));
  const DeviceBuffer device_magnitudes = upload(magnitudes.data(), magnitudes.size() * sizeof(uint32_t));
  const DeviceBuffer factors(&tracker, Purpose::kWorkspace, tokens * sizeof(float));

  // More outputs a token than the matrix has, and guards before and after: none of them may change. With four, kernels
  // may take four neighbours at a time; where the tokens are odd in number, with two, they may not.
  const int32_t gap = test->num_tokens % 2 == 0 ? 4 : 2;
  const int64_t out_stride = test->num_rows + gap;
  const size_t out_bytes = tokens * static_cast<size_t>(out_stride) * sizeof(float);
  std::vector<uint8_t> host(out_bytes + 2 * kGuardBytes, kGuard);
  auto* const values = reinterpret_cast<float*>(host.data() + kGuardBytes);
  for (size_t t = 0; t < tokens && test->addend != nullptr; ++t) {
    std::memcpy(values + static_cast<int64_t>(t) * out_stride, test->addend + static_cast<int64_t>(t) * test->num_rows,
                static_cast<size_t>(test->num_rows) * sizeof(float));
  }
  const DeviceBuffer out = upload(host.data(), host.size());

  tw::cuda::MatmulTask task{};
  task.part = matrix.parts.at(0);
  if (test->num_splits > 0) task.part.num_splits = std::min(test->num_splits, task.part.num_steps);
  task.num_tokens = test->num_tokens;
  task.input_stride = stride;
  task.input_kind = tw::cuda::Input::kHalf;
  task.input = device_halves.as<__half>();
  if (test->scaled != 0 && test->num_tokens <= tw::cuda::kFusedTokens && test->up == nullptr) {
    task.input_kind = tw::cuda::Input::kScaled;
    task.input = device_rows.as<float>();
    task.input_magnitudes = device_magnitudes.as<uint32_t>();
  } else if (test->scaled != 0) {
    tw::cuda::scale_to_half(device_rows.as<float>(), stride, test->num_tokens, tiled, device_halves.as<__half>(),
                            factors.as<float>(), stream.get());
    task.token_factors = factors.as<float>();
  }
  task.epilogue = test->up != nullptr       ? tw::cuda::Epilogue::kGateUp
                  : test->addend != nullptr ? tw::cuda::Epilogue::kAdd
                                            : tw::cuda::Epilogue::kStore;
  task.bias = matrix.bias.as<float>();
  task.out = reinterpret_cast<float*>(out.as<uint8_t>() + kGuardBytes);
  task.out_stride = out_stride;
  task.tiled = tiled;
  task.kernel = test->kernel < 1 ? tw::cuda::Kernel::kAuto : static_cast<tw::cuda::Kernel>(test->kernel);
  const DeviceBuffer sums(&tracker, Purpose::kWorkspace, tw::cuda::kScratchBytes);
  const DeviceBuffer arrivals(&tracker, Purpose::kWorkspace, tw::cuda::kScratchArrivals * sizeof(int32_t));
  task.scratch = {sums.as<float>(), tw::cuda::kScratchBytes / 4, arrivals.as<int32_t>(), tw::cuda::kScratchArrivals};
  task.stream = stream.get();
  TW_CUDA_CHECK(cudaDeviceSynchronize());  // a copy from pageable memory may still be on its way
  tw::cuda::matmul(task);
  stream.synchronize();
  TW_CUDA_CHECK(cudaMemcpy(host.data(), out.as<uint8_t>(), host.size(), cudaMemcpyDeviceToHost));

  bool touched = false;
  for (size_t i = 0; i < kGuardBytes; ++i) {
    touched = touched || host[i] != kGuard || host[host.size() - 1 - i] != kGuard;
  }
  for (size_t t = 0; t < tokens; ++t) {
    const float* row = values + static_cast<int64_t>(t) * out_stride;
    std::memcpy(test->out + static_cast<int64_t>(t) * test->num_rows, row,
                static_cast<size_t>(test->num_rows) * sizeof(float));
    for (int32_t i = 0; i < gap; ++i) {
      uint32_t bits;
      std::memcpy(&bits, row + test->num_rows + i, sizeof bits);
      touched = touched || bits != 0xA5A5A5A5u;
    }
  }
  if (touched) throw tw::Error(tw::ErrorCode::kInternal, "a kernel wrote outside its output");

  std::vector<float> times;
  cudaEvent_t begin, end;
  TW_CUDA_CHECK(cudaEventCreate(&begin));
  TW_CUDA_CHECK(cudaEventCreate(&end));
  for (int32_t i = 0; i < test->repeats; ++i) {
    TW_CUDA_CHECK(cudaEventRecord(begin, stream.get()));
    for (int k = 0; k < 10; ++k) tw::cuda::matmul(task);
    TW_CUDA_CHECK(cudaEventRecord(end, stream.get()));
    stream.synchronize();
    float ms = 0;
    TW_CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    times.push_back(ms * 100.0f);
  }
  TW_CUDA_CHECK(cudaEventDestroy(begin));
  TW_CUDA_CHECK(cudaEventDestroy(end));
  std::sort(times.begin(), times.end());
  test->microseconds = times.empty() ? 0.0f : times[times.size() / 2];
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void* tw_cuda_create_backend(int32_t device, TwCudaFailure* failure) {
  void* result = nullptr;
  guarded(failure, [&] {
    std::unique_ptr<tw::Backend> backend = tw::cuda::make_cuda_backend(device);
    result = backend.release();
  });
  return result;
}

__attribute__((visibility("default"))) int32_t tw_cuda_test_matmul(TwCudaMatmulTest* test, TwCudaFailure* failure) {
  return guarded(failure, [&] { run_matmul_test(test); }) ? 0 : -1;
}

}  // extern "C"
