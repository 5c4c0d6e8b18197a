#include "core/aligned_buffer.h"

#include <sys/mman.h>

#include <string>
#include <utility>

#include "core/error.h"

namespace tw {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kHugePage = size_t{2} << 20;

}  // namespace

// An anonymous mapping is zeroed and returns to the system when freed. Large ones are mapped with room to align them to
// huge pages; the unaligned ends are unmapped again.
AlignedBuffer::AlignedBuffer(size_t num_bytes, const char* purpose) : size_(num_bytes) {
  if (num_bytes == 0) return;
  const bool huge = num_bytes >= kHugePage;
  const size_t unit = huge ? kHugePage : kPage;
  if (num_bytes > SIZE_MAX / 2) throw Error(ErrorCode::kInsufficientVram, std::string(purpose) + ": size overflows");
  mapped_bytes_ = (num_bytes + unit - 1) / unit * unit;
  const size_t reserved = huge ? mapped_bytes_ + kHugePage : mapped_bytes_;
  void* base = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    throw Error(ErrorCode::kInsufficientVram,
                std::string("not enough memory for ") + purpose + ": " + std::to_string(num_bytes) + " bytes");
  }
  auto* start = static_cast<uint8_t*>(base);
  if (huge) {
    const auto address = reinterpret_cast<uintptr_t>(start);
    const size_t head = (kHugePage - address % kHugePage) % kHugePage;
    if (head != 0) munmap(start, head);
    const size_t tail = reserved - head - mapped_bytes_;
    if (tail != 0) munmap(start + head + mapped_bytes_, tail);
    start += head;
    madvise(start, mapped_bytes_, MADV_HUGEPAGE);
  }
  data_ = start;
}

AlignedBuffer::AlignedBuffer(AlignedBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      mapped_bytes_(std::exchange(other.mapped_bytes_, 0)) {}

AlignedBuffer& AlignedBuffer::operator=(AlignedBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(mapped_bytes_, other.mapped_bytes_);
  return *this;
}

AlignedBuffer::~AlignedBuffer() {
  if (data_ != nullptr) munmap(data_, mapped_bytes_);
}

}  // namespace tw
