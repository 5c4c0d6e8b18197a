// A thread that answers health checks on ports of its own, whatever Python and the event loop are doing.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "health/connection.h"
#include "health/endings.h"
#include "health/serving_table.h"

namespace tw::health {

// A file descriptor that is closed with its owner.
class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  ~Descriptor();
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor& operator=(Descriptor&&) = delete;

  int get() const { return fd_; }

 private:
  int fd_;
};

struct ServerLimits {
  ConnectionLimits connection;
  size_t most_connections = 1000;
  std::chrono::milliseconds handshake_timeout{10'000};
  std::chrono::milliseconds idle_timeout{300'000};  // without bytes either way and without a watch
  std::chrono::milliseconds stale_after{30'000};    // ServingTable
};

// Owns its thread, the listening sockets and all connections. The thread alone touches those.
class HealthServer {
 public:
  // `listening` are bound, listening sockets, owned from here on, also where this throws.
  // Throws Error, kInternal, if the system has no room for what the thread needs.
  HealthServer(std::vector<int> listening, std::vector<std::string> services, const ServerLimits& limits);
  ~HealthServer();
  HealthServer(const HealthServer&) = delete;
  HealthServer& operator=(const HealthServer&) = delete;

  // What is served from now on, in the order of the services; to be repeated well before `stale_after` is over.
  void publish(const std::vector<bool>& is_serving);
  // Says goodbye to every peer and closes. Idempotent; not for two threads at once.
  void stop();
  Endings& endings() { return endings_; }

 private:
  struct Peer {
    Peer(Descriptor socket_, const ServingTable& table, Endings& endings, const ConnectionLimits& limits,
         Clock::time_point now)
        : socket(std::move(socket_)), connection(table, endings, limits), opened_at(now), active_at(now) {}

    Descriptor socket;
    Connection connection;
    Clock::time_point opened_at;
    Clock::time_point active_at;
    uint32_t awaited_events = 0;
  };
  using Peers = std::unordered_map<int, std::unique_ptr<Peer>>;

  void run();
  void accept_from(int listening, Clock::time_point now);
  void listen_again();
  void read_from(Peer& peer, Clock::time_point now);
  // Sends what fits and awaits what comes next. False if the peer is to be closed.
  bool flush(Peer& peer, Clock::time_point now);
  bool is_overdue(const Peer& peer, Clock::time_point now) const;
  void await_events(int fd, uint32_t events, bool is_new);

  const ServerLimits limits_;
  std::vector<Descriptor> listening_;
  ServingTable table_;
  Endings endings_;
  const Descriptor epoll_;
  const Descriptor wake_;
  std::atomic<bool> is_stopping_{false};
  bool is_accepting_ = true;
  Peers peers_;
  std::thread thread_;  // last: starts when all else is ready
};

}  // namespace tw::health
