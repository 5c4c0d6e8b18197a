// Owners of what the driver lends: device memory counted by purpose, pinned staging, streams, events and graphs.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "core/backend.h"

namespace tw::cuda {

enum class Purpose { kWeights, kKv, kWorkspace };

// Knows every allocation of one backend: its bytes by purpose, and where it lies. Outlives its buffers. Thread-safe.
class MemoryTracker {
 public:
  explicit MemoryTracker(int device) : device_(device) {}
  int device() const { return device_; }
  MemoryUse use() const;
  void add(const void* address, Purpose purpose, size_t num_bytes);
  void remove(const void* address);

  // Asks the driver where each allocation lies. Empty if all are in the device's memory, else names the first that is
  // not. The current device must be this one.
  std::string check_residency() const;

  // Bytes the current device can still give.
  static int64_t free_bytes();

 private:
  struct Allocation {
    Purpose purpose;
    size_t num_bytes;
  };

  const int device_;
  mutable std::mutex mutex_;  // guards allocations_
  std::map<const void*, Allocation> allocations_;
};

// Device memory, zeroed. Move-only.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  // Throws Error(kInsufficientVram) naming what was required, what is available and the device.
  DeviceBuffer(MemoryTracker* tracker, Purpose purpose, size_t num_bytes);
  DeviceBuffer(DeviceBuffer&& other) noexcept { *this = std::move(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  ~DeviceBuffer() { reset(); }

  size_t size() const { return size_; }
  template <class T = uint8_t>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void reset() noexcept;

  MemoryTracker* tracker_ = nullptr;
  Purpose purpose_ = Purpose::kWorkspace;
  void* data_ = nullptr;
  size_t size_ = 0;
};

// Page-locked host memory that the device can read and write: staging of step inputs and sampled tokens only.
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  explicit PinnedBuffer(size_t num_bytes);
  PinnedBuffer(PinnedBuffer&& other) noexcept { *this = std::move(other); }
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept;
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;
  ~PinnedBuffer();

  size_t size() const { return size_; }
  template <class T = uint8_t>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

class Stream {
 public:
  Stream();
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }
  void synchronize() const;

 private:
  cudaStream_t stream_ = nullptr;
};

// A point in a stream that the host can wait for.
class Event {
 public:
  Event();
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(cudaStream_t stream) const;
  // At once if it was never recorded.
  void synchronize() const;

 private:
  cudaEvent_t event_ = nullptr;
};

// An instantiated graph. Move-only.
class GraphExec {
 public:
  GraphExec() = default;
  // Ends the capture on the stream and instantiates what was captured.
  static GraphExec end_capture(cudaStream_t stream);
  GraphExec(GraphExec&& other) noexcept : exec_(std::exchange(other.exec_, nullptr)) {}
  GraphExec& operator=(GraphExec&& other) noexcept {
    std::swap(exec_, other.exec_);
    return *this;
  }
  ~GraphExec();
  void launch(cudaStream_t stream) const;

 private:
  cudaGraphExec_t exec_ = nullptr;
};

}  // namespace tw::cuda
