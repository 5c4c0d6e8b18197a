// The model file reader: corpus, properties over random headers, typed access, and files that change while mapped.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "core/checked.h"
#include "gguf/file.h"
#include "gguf/text.h"
#include "walk_gguf.h"

namespace {

namespace fs = std::filesystem;
using tw::ErrorCode;
using tw::gguf::File;
using tw::gguf::ValueType;

// A file as bytes, written field by field.
class Bytes {
 public:
  template <class T>
  Bytes& put(T value) {
    const auto* at = reinterpret_cast<const uint8_t*>(&value);
    data_.insert(data_.end(), at, at + sizeof value);
    return *this;
  }
  Bytes& text(const std::string& value) {
    put<uint64_t>(value.size());
    data_.insert(data_.end(), value.begin(), value.end());
    return *this;
  }
  Bytes& header(uint64_t num_tensors, uint64_t num_keys) {
    return put<uint32_t>(0x46554747).put<uint32_t>(3).put<uint64_t>(num_tensors).put<uint64_t>(num_keys);
  }
  template <class T>
  Bytes& scalar(const std::string& key, ValueType type, T value) {
    return text(key).put<uint32_t>(static_cast<uint32_t>(type)).put<T>(value);
  }
  Bytes& string(const std::string& key, const std::string& value) {
    return text(key).put<uint32_t>(static_cast<uint32_t>(ValueType::kString)).text(value);
  }
  Bytes& tensor(const std::string& name, const std::vector<uint64_t>& dims, uint32_t type, uint64_t offset) {
    text(name).put<uint32_t>(static_cast<uint32_t>(dims.size()));
    for (const uint64_t dim : dims) put<uint64_t>(dim);
    return put<uint32_t>(type).put<uint64_t>(offset);
  }
  Bytes& fill(size_t count, uint8_t value) {
    data_.resize(data_.size() + count, value);
    return *this;
  }
  Bytes& zeros(size_t count) { return fill(count, 0); }
  Bytes& pad() { return zeros((32 - data_.size() % 32) % 32); }

  File open() const { return File::from_bytes("test.gguf", data_.data(), data_.size()); }
  const std::vector<uint8_t>& data() const { return data_; }

 private:
  std::vector<uint8_t> data_;
};

// A file on disk that goes away with the object.
class TemporaryFile {
 public:
  explicit TemporaryFile(const std::vector<uint8_t>& data) {
    std::string pattern = (fs::temp_directory_path() / "gguf_test.XXXXXX").string();
    const int fd = mkstemp(pattern.data());
    if (fd < 0) throw std::runtime_error("mkstemp failed");
    close(fd);
    path_ = pattern;
    std::ofstream(path_, std::ios::binary)
        .write(reinterpret_cast<const char*>(data.data()), static_cast<std::streamsize>(data.size()));
  }
  ~TemporaryFile() { std::remove(path_.c_str()); }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

std::vector<uint8_t> read_all(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

// One F32 tensor `w` whose bytes are all 7.
Bytes file_of_sevens(uint64_t num_values) {
  Bytes bytes;
  bytes.header(1, 0).tensor("w", {num_values}, 0, 0).pad().fill(num_values * 4, 7);
  return bytes;
}

uint64_t sum(const tw::gguf::TensorInfo& tensor) {
  uint64_t total = 0;
  for (int64_t i = 0; i < tensor.num_bytes; ++i) total += tensor.data[i];
  return total;
}

int64_t resident_file_bytes() {
  std::ifstream in("/proc/self/statm");
  int64_t total = 0;
  int64_t resident = 0;
  int64_t shared = 0;
  in >> total >> resident >> shared;
  return shared * sysconf(_SC_PAGESIZE);
}

}  // namespace

TEST(corpus_is_accepted_or_refused_as_its_names_say) {
  size_t num_files = 0;
  for (const auto& entry : fs::directory_iterator(TW_TEST_DATA "/corpus/gguf")) {
    const std::vector<uint8_t> data = read_all(entry.path());
    const std::string name = entry.path().filename().string();
    const bool accepted = tw::test::walk_gguf(data.data(), data.size());
    CHECK_EQ(name + (accepted ? " accepted" : " refused"),
             name + (name.rfind("valid", 0) == 0 ? " accepted" : " refused"));
    ++num_files;
  }
  CHECK(num_files >= 29);
}

TEST(a_file_cut_anywhere_is_refused) {
  const std::vector<uint8_t> whole = read_all(TW_TEST_DATA "/corpus/gguf/valid-formats.gguf");
  CHECK(tw::test::walk_gguf(whole.data(), whole.size()));
  const auto last = File::from_bytes("whole", whole.data(), whole.size()).tensors().back();
  const size_t end = last.offset + static_cast<size_t>(last.num_bytes);
  for (size_t size = 0; size < end; ++size) {
    // A copy of its own size, so that the sanitizer sees a read beyond it.
    const std::vector<uint8_t> cut(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size));
    if (tw::test::walk_gguf(cut.data(), cut.size())) CHECK_EQ(size, end);
  }
}

TEST(any_flipped_byte_is_refused_or_keeps_every_span_inside) {
  const std::vector<uint8_t> whole = read_all(TW_TEST_DATA "/corpus/gguf/valid-values.gguf");
  for (size_t at = 0; at < whole.size(); ++at) {
    for (const int flip : {0x01, 0x80, 0xff}) {
      std::vector<uint8_t> changed = whole;
      changed[at] = static_cast<uint8_t>(changed[at] ^ flip);
      tw::test::walk_gguf(changed.data(), changed.size());
    }
  }
}

TEST(random_shapes_are_refused_or_keep_every_span_inside) {
  std::mt19937_64 random(1);
  const uint64_t dims[] = {0,
                           1,
                           2,
                           31,
                           32,
                           33,
                           255,
                           256,
                           (uint64_t{1} << 42) + 1,
                           uint64_t{1} << 22,
                           uint64_t{1} << 31,
                           uint64_t{1} << 32,
                           uint64_t{1} << 62,
                           (uint64_t{1} << 63) - 64,
                           uint64_t{1} << 63,
                           ~uint64_t{0} - 63,
                           ~uint64_t{0}};
  const uint64_t offsets[] = {0, 1, 32, 64, 4096, uint64_t{1} << 40, ~uint64_t{0} - 31, ~uint64_t{0}};
  size_t num_accepted = 0;
  for (int round = 0; round < 100000; ++round) {
    std::vector<uint64_t> shape(1 + random() % 4);
    for (uint64_t& dim : shape) dim = dims[random() % (round % 2 == 0 ? 8 : std::size(dims))];
    Bytes bytes;
    bytes.header(1, 0).tensor("w", shape, static_cast<uint32_t>(random() % 40), offsets[random() % std::size(offsets)]);
    bytes.pad().zeros(random() % 2048);
    num_accepted += tw::test::walk_gguf(bytes.data().data(), bytes.data().size()) ? 1 : 0;
  }
  CHECK(num_accepted > 100);
}

TEST(typed_getters_return_exactly_their_type) {
  Bytes bytes;
  bytes.header(0, 4)
      .scalar<uint32_t>("u", ValueType::kUint32, 7)
      .scalar<float>("f", ValueType::kFloat32, 2.5f)
      .string("s", "text")
      .scalar<uint8_t>("b", ValueType::kBool, 1);
  const File file = bytes.open();
  const auto& metadata = file.metadata();
  CHECK_EQ(metadata.get_u32("u"), 7u);
  CHECK_EQ(metadata.get_f32("f"), 2.5f);
  CHECK_EQ(metadata.get_string("s"), "text");
  CHECK(metadata.get_bool("b"));
  CHECK(!metadata.find_u32("absent").has_value());
  CHECK(!metadata.find_array<int32_t>("absent").has_value());
  CHECK_THROWS(ErrorCode::kModelLoadFailed, "test.gguf: key `absent` is missing", metadata.get_u32("absent"));
  CHECK_THROWS(ErrorCode::kModelLoadFailed, "key `s` has type string, uint32 expected (offset ", metadata.get_u32("s"));
  CHECK_THROWS(ErrorCode::kModelLoadFailed, "has type uint32, array of string expected",
               metadata.find_array<std::string_view>("u"));
  CHECK_THROWS(ErrorCode::kModelLoadFailed, "has type float32, int32 expected", metadata.find<int32_t>("f"));
}

TEST(ranges_are_inclusive_and_named) {
  Bytes bytes;
  bytes.header(0, 2).scalar<uint32_t>("u", ValueType::kUint32, 7).scalar<float>("f", ValueType::kFloat32, 2.5f);
  const File file = bytes.open();
  CHECK_EQ(file.metadata().get_u32("u", 7, 7), 7u);
  CHECK_EQ(*file.metadata().find_f32("f", 0, 2.5f), 2.5f);
  CHECK(!file.metadata().find_u32("absent", 1, 2).has_value());
  CHECK_THROWS(ErrorCode::kModelLoadFailed, "key `u` is 7, outside 8 to 9", file.metadata().get_u32("u", 8, 9));
  CHECK_THROWS(ErrorCode::kModelLoadFailed, "key `f` is 2.5, outside 1e-12 to 2",
               file.metadata().get_f32("f", 1e-12f, 2));
}

TEST(arrays_are_checked_for_type_and_count) {
  Bytes bytes;
  bytes.header(0, 2);
  bytes.text("i").put<uint32_t>(9).put<uint32_t>(5).put<uint64_t>(3).put<int32_t>(1).put<int32_t>(-2).put<int32_t>(3);
  bytes.text("s").put<uint32_t>(9).put<uint32_t>(8).put<uint64_t>(2).text("").text("xy");
  const File file = bytes.open();
  CHECK(file.metadata().get_array<int32_t>("i", 3) == (std::vector<int32_t>{1, -2, 3}));
  CHECK(file.metadata().get_array<std::string_view>("s") == (std::vector<std::string_view>{"", "xy"}));
  CHECK_THROWS(ErrorCode::kModelLoadFailed, "has 3 elements, 4 expected", file.metadata().get_array<int32_t>("i", 4));
  CHECK_THROWS(ErrorCode::kModelLoadFailed, "has type array of int32, array of float32 expected",
               file.metadata().get_array<float>("i"));
  CHECK_THROWS(ErrorCode::kModelLoadFailed, "has type array of int32, int32 expected",
               file.metadata().get<int32_t>("i"));
}

TEST(numbers_that_are_not_finite_are_refused) {
  Bytes bytes;
  bytes.header(0, 2).scalar<float>("f", ValueType::kFloat32, std::numeric_limits<float>::quiet_NaN());
  bytes.text("a").put<uint32_t>(9).put<uint32_t>(6).put<uint64_t>(1).put<float>(std::numeric_limits<float>::infinity());
  const File file = bytes.open();
  CHECK_THROWS(ErrorCode::kModelLoadFailed, "key `f` is not a finite number", file.metadata().get_f32("f"));
  CHECK_THROWS(ErrorCode::kModelLoadFailed, "not finite", file.metadata().get_array<float>("a"));
}

TEST(a_tensor_is_fetched_with_the_shape_expected) {
  Bytes bytes;
  bytes.header(1, 0).tensor("w", {4, 2}, 0, 0).pad().zeros(32);
  const File file = bytes.open();
  CHECK_EQ(file.tensor("w", {4, 2}).num_rows(), 2);
  CHECK_THROWS(ErrorCode::kModelLoadFailed, "tensor `w` has shape [4, 2], [2, 4] expected", file.tensor("w", {2, 4}));
  CHECK_THROWS(ErrorCode::kModelLoadFailed, "tensor `v` is missing", file.tensor("v"));
}

TEST(the_largest_counts_fit_and_one_more_does_not) {
  Bytes most;
  most.header(0, tw::gguf::kMaxKeys);
  for (uint64_t i = 0; i < tw::gguf::kMaxKeys; ++i) most.scalar<uint8_t>(std::to_string(i), ValueType::kUint8, 1);
  CHECK_EQ(most.open().metadata().entries().size(), tw::gguf::kMaxKeys);
  Bytes more;
  more.header(0, tw::gguf::kMaxKeys + 1).zeros(2 << 20);
  CHECK_THROWS(ErrorCode::kModelLoadFailed, "65537 keys, more than the limit of 65536", more.open());
  Bytes key;
  key.header(0, 1).scalar<uint8_t>(std::string(65535, 'k'), ValueType::kUint8, 1);
  CHECK_EQ(key.open().metadata().entries().size(), size_t{1});
  Bytes long_key;
  long_key.header(0, 1).scalar<uint8_t>(std::string(65536, 'k'), ValueType::kUint8, 1);
  CHECK_THROWS(ErrorCode::kModelLoadFailed, "a key has 65536 bytes, more than the limit of 65535", long_key.open());
  Bytes long_text;
  long_text.header(0, 1).string("k", std::string((16 << 20) + 1, 'x'));
  CHECK_THROWS(ErrorCode::kModelLoadFailed, "more than the limit of 16777216", long_text.open());
}

TEST(messages_never_carry_control_characters_or_broken_text) {
  CHECK_EQ(tw::gguf::printable("a\nb\r\x1b[0m\x7f"), "a\\x0ab\\x0d\\x1b[0m\\x7f");
  CHECK_EQ(tw::gguf::printable("é\xff\xc3"), "é\\xff\\xc3");
  CHECK_EQ(tw::gguf::printable("\xe2\x80\xa8\xc2\x85"), "\\xe2\\x80\\xa8\\xc2\\x85");
  CHECK_EQ(tw::gguf::printable("\xed\xa0\x80"), "\\xed\\xa0\\x80");
  CHECK_EQ(tw::gguf::printable("日本語", 7), "日本…");
}

TEST(checked_arithmetic_answers_overflow) {
  const uint64_t most = std::numeric_limits<uint64_t>::max();
  CHECK(!tw::checked_add(most, 1));
  CHECK(!tw::checked_mul(uint64_t{1} << 32, uint64_t{1} << 32));
  CHECK(!tw::checked_align_up(most - 5, 32));
  CHECK_EQ(*tw::checked_align_up(33, 32), 64u);
  CHECK_EQ(*tw::checked_align_up(64, 32), 64u);
}

TEST(a_moved_file_keeps_its_tensors) {
  const TemporaryFile disk(file_of_sevens(1000).data());
  File first(disk.path());
  const uint8_t* data = first.tensors()[0].data;
  const File second = std::move(first);
  CHECK(second.tensor("w").data == data);
  CHECK_EQ(sum(second.tensor("w")), uint64_t{28000});
  second.check_unchanged();
}

TEST(a_file_shortened_while_mapped_fails_the_load_and_not_the_process) {
  const TemporaryFile disk(file_of_sevens(1 << 18).data());
  const File file(disk.path());
  const uint64_t whole = sum(file.tensor("w"));
  file.check_unchanged();
  CHECK_EQ(truncate(disk.path().c_str(), 4096), 0);
  CHECK(sum(file.tensor("w")) < whole);
  CHECK_THROWS(ErrorCode::kModelLoadFailed, "the file changed, or could not be read, while it was loaded",
               file.check_unchanged());
}

TEST(a_fault_outside_model_files_still_ends_the_process) {
  const TemporaryFile disk(file_of_sevens(1000).data());
  const File file(disk.path());  // installs the handler
  const TemporaryFile other(std::vector<uint8_t>(8192, 1));
  const int fd = open(other.path().c_str(), O_RDONLY);
  const auto* bytes = static_cast<const volatile uint8_t*>(mmap(nullptr, 8192, PROT_READ, MAP_PRIVATE, fd, 0));
  CHECK_EQ(truncate(other.path().c_str(), 0), 0);
  const pid_t child = fork();
  if (child == 0) {
    close(STDERR_FILENO);  // a sanitizer's report of the fault we want
    _exit(bytes[4096] == 1 ? 0 : 0);
  }
  int status = 0;
  CHECK_EQ(waitpid(child, &status, 0), child);
  CHECK(WIFSIGNALED(status) || WEXITSTATUS(status) != 0);
  close(fd);
}

TEST(too_many_open_files_are_an_error_and_closing_makes_room) {
  const TemporaryFile disk(file_of_sevens(8).data());
  std::vector<File> files;
  const auto open_one_more = [&] { files.emplace_back(disk.path()); };
  for (int i = 0; i < 256; ++i) open_one_more();
  CHECK_THROWS(ErrorCode::kModelLoadFailed, "more than 256 model files are open at once", open_one_more());
  files.pop_back();
  open_one_more();
  files.back().check_unchanged();
}

TEST(a_file_rewritten_while_mapped_fails_the_load) {
  const TemporaryFile disk(file_of_sevens(1000).data());
  const File file(disk.path());
  const timespec times[2] = {{1, 0}, {1, 0}};
  CHECK_EQ(utimensat(AT_FDCWD, disk.path().c_str(), times, 0), 0);
  CHECK_THROWS(ErrorCode::kModelLoadFailed, "the file changed", file.check_unchanged());
}

TEST(released_pages_leave_memory_and_come_back) {
  constexpr int64_t kBytes = int64_t{16} << 20;
  const TemporaryFile disk(file_of_sevens(kBytes / 4).data());
  const File file(disk.path());
  const uint64_t before = sum(file.tensor("w"));
  const int64_t resident = resident_file_bytes();
  file.release_pages(file.tensor("w"));
  CHECK(resident - resident_file_bytes() > kBytes * 9 / 10);
  CHECK_EQ(sum(file.tensor("w")), before);
}
