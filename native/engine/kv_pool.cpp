#include "engine/kv_pool.h"

#include <algorithm>

namespace tw {

KvPool::KvPool(int32_t num_blocks, bool prefix_cache)
    : prefix_cache_(prefix_cache), blocks_(static_cast<size_t>(num_blocks)) {
  free_.reserve(blocks_.size());
  for (int32_t block = num_blocks - 1; block >= 0; --block) free_.push_back(block);
}

int32_t KvPool::allocate() {
  int32_t block;
  if (!free_.empty()) {
    block = free_.back();
    free_.pop_back();
  } else {
    block = lru_.front();
    lru_.pop_front();
    withdraw(block);
    ++num_evictions_;
  }
  blocks_[static_cast<size_t>(block)].references = 1;
  return block;
}

void KvPool::release(int32_t block) {
  Block& entry = blocks_[static_cast<size_t>(block)];
  if (--entry.references > 0) return;
  if (entry.published) {
    entry.lru = lru_.insert(lru_.end(), block);
  } else {
    free_.push_back(block);
  }
}

void KvPool::withdraw(int32_t block) {
  Block& entry = blocks_[static_cast<size_t>(block)];
  published_.erase(entry.hash);
  entry.published = false;
  entry.salt.clear();
}

KvPool::Hash KvPool::root_hash(const std::string& salt) {
  Sha256 hash;
  hash.update("tokenwire.kv.1", 14);
  hash.update(salt.data(), salt.size());
  return hash.digest();
}

KvPool::Hash KvPool::chain_hash(const Hash& parent, const int32_t* tokens) {
  Sha256 hash;
  hash.update(parent.data(), parent.size());
  hash.update(tokens, sizeof(int32_t) * kBlockTokens);
  return hash.digest();
}

const KvPool::Block* KvPool::find(const Hash& hash, const std::string& salt, const Hash& parent, const int32_t* tokens,
                                  int32_t* index) const {
  const auto found = published_.find(hash);
  if (found == published_.end()) return nullptr;
  const Block& entry = blocks_[static_cast<size_t>(found->second)];
  if (entry.salt != salt || entry.parent != parent) return nullptr;
  if (!std::equal(entry.tokens.begin(), entry.tokens.end(), tokens)) return nullptr;
  *index = found->second;
  return &entry;
}

std::vector<int32_t> KvPool::acquire_prefix(const std::string& salt, const int32_t* tokens, int32_t num_tokens) {
  std::vector<int32_t> found;
  if (!prefix_cache_) return found;
  Hash parent = root_hash(salt);
  for (int32_t begin = 0; begin + kBlockTokens <= num_tokens; begin += kBlockTokens) {
    const Hash hash = chain_hash(parent, tokens + begin);
    int32_t block;
    if (find(hash, salt, parent, tokens + begin, &block) == nullptr) break;
    Block& entry = blocks_[static_cast<size_t>(block)];
    if (entry.references++ == 0) lru_.erase(entry.lru);
    found.push_back(block);
    parent = hash;
  }
  return found;
}

KvPool::Hash KvPool::publish(int32_t block, const std::string& salt, const Hash& parent, const int32_t* tokens) {
  const Hash hash = chain_hash(parent, tokens);
  if (!prefix_cache_) return hash;
  Block& entry = blocks_[static_cast<size_t>(block)];
  if (entry.published || !published_.emplace(hash, block).second) return hash;
  entry.published = true;
  entry.hash = hash;
  entry.parent = parent;
  entry.salt = salt;
  std::copy_n(tokens, kBlockTokens, entry.tokens.begin());
  return hash;
}

int32_t KvPool::clear_cache() {
  const int32_t count = num_cached();
  for (const int32_t block : lru_) {
    withdraw(block);
    free_.push_back(block);
  }
  lru_.clear();
  return count;
}

CacheContents KvPool::cache_contents() const {
  CacheContents contents;
  for (const auto& [hash, block] : published_) {
    const Block& entry = blocks_[static_cast<size_t>(block)];
    CacheShare& share = contents[entry.salt];
    ++(entry.references == 0 ? share.cached_blocks : share.shared_blocks);
  }
  return contents;
}

std::string KvPool::audit(const std::vector<const std::vector<int32_t>*>& held) const {
  std::vector<int32_t> expected(blocks_.size(), 0);
  for (const auto* table : held) {
    for (const int32_t block : *table) ++expected[static_cast<size_t>(block)];
  }
  std::vector<char> place(blocks_.size(), 0);
  for (const int32_t block : free_) ++place[static_cast<size_t>(block)];
  for (const int32_t block : lru_) ++place[static_cast<size_t>(block)];
  for (size_t i = 0; i < blocks_.size(); ++i) {
    const std::string name = "block " + std::to_string(i);
    if (blocks_[i].references != expected[i]) {
      return name + " has " + std::to_string(blocks_[i].references) + " references, " + std::to_string(expected[i]) +
             " sequences hold it";
    }
    const char wanted = expected[i] == 0 ? 1 : 0;
    if (place[i] != wanted) return name + " is listed " + std::to_string(place[i]) + " times as free or cached";
  }
  if (num_free() + num_used() + num_cached() != num_total()) return "free + used + cached differs from total";
  return "";
}

}  // namespace tw
