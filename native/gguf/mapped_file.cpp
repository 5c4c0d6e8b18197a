#include "gguf/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "core/error.h"

namespace tw::gguf {
namespace {

[[noreturn]] void fail(const std::string& name, const std::string& problem) {
  throw Error(ErrorCode::kModelLoadFailed, name + ": " + problem);
}

[[noreturn]] void fail_errno(const std::string& name, const char* problem, int error) {
  fail(name, std::string(problem) + ": " + std::generic_category().message(error));
}

const char* kind_of(mode_t mode) {
  if (S_ISDIR(mode)) return "a directory";
  if (S_ISFIFO(mode)) return "a FIFO";
  if (S_ISSOCK(mode)) return "a socket";
  if (S_ISCHR(mode) || S_ISBLK(mode)) return "a device";
  return "not a regular file";
}

void check_regular(const struct stat& status, const std::string& name) {
  if (!S_ISREG(status.st_mode)) fail(name, std::string("this is ") + kind_of(status.st_mode) + ", not a model file");
}

}  // namespace

MappedFile::MappedFile(const std::string& path, const std::string& name) {
  // Asked before opening, since opening alone can act on a device; and again afterwards, of what was really opened.
  struct stat status = {};
  if (stat(path.c_str(), &status) != 0) fail_errno(name, "the file cannot be opened", errno);
  check_regular(status, name);
  MappedFile file;
  file.fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (file.fd_ < 0) fail_errno(name, "the file cannot be opened", errno);
  if (fstat(file.fd_, &status) != 0) fail_errno(name, "the file cannot be examined", errno);
  check_regular(status, name);
  if (status.st_size == 0) fail(name, "the file is empty");
  file.size_ = static_cast<uint64_t>(status.st_size);
  file.modified_ = status.st_mtim;
  void* mapping = mmap(nullptr, file.size_, PROT_READ, MAP_PRIVATE, file.fd_, 0);
  if (mapping == MAP_FAILED) fail_errno(name, "the file cannot be mapped", errno);
  file.data_ = static_cast<const uint8_t*>(mapping);
  file.guard_ = BusGuard(mapping, file.size_);
  *this = std::move(file);
}

MappedFile::~MappedFile() {
  guard_ = BusGuard();
  if (data_ != nullptr) munmap(const_cast<uint8_t*>(data_), size_);
  if (fd_ >= 0) close(fd_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept { *this = std::move(other); }

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(modified_, other.modified_);
  std::swap(guard_, other.guard_);
  return *this;
}

void MappedFile::release(const uint8_t* begin, uint64_t num_bytes) const {
  if (data_ == nullptr || num_bytes == 0) return;
  const auto page_bytes = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  const auto offset = static_cast<uint64_t>(begin - data_);
  const uint64_t first = offset / page_bytes * page_bytes;
  // Advice only: if the kernel refuses, pages stay until memory is short.
  madvise(const_cast<uint8_t*>(data_) + first, offset - first + num_bytes, MADV_DONTNEED);
}

bool MappedFile::unchanged() const {
  if (fd_ < 0) return true;
  struct stat status = {};
  return !guard_.damaged() && fstat(fd_, &status) == 0 && static_cast<uint64_t>(status.st_size) == size_ &&
         status.st_mtim.tv_sec == modified_.tv_sec && status.st_mtim.tv_nsec == modified_.tv_nsec;
}

}  // namespace tw::gguf
