// SPDX-License-Identifier: Apache-2.0
// The first process of a Linux guest: a server in small. It counts, keeps each number on its disk before it says it, and sends it to
// its host by UDP. PORT of the host is on the kernel's command line as `port=PORT`; the host echoes a number, or answers `end`, `again` or `sleep`.
//
//     guest: boot ID log N                    the machine's boot id, and the numbers that an earlier boot left on the disk
//     guest: tick N mono MS echo N            number N was written and fsynced; the last number that the host has echoed
//     guest: sleeps                           the machine suspends to RAM; the next line is said when it was woken
//     guest: wrong TEXT                       what must not happen
//     guest: end log N                        all numbers read back from the disk itself; the machine powers off, or starts again

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <net/route.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { RECORD = 16, TICK_MS = 20, LONGEST_STEP_MS = 40000 };

static void say(const char *format, ...)
{
    char line[256];
    va_list words;
    int length = snprintf(line, sizeof line, "guest: ");
    va_start(words, format);
    length += vsnprintf(line + length, sizeof line - length - 1, format, words);
    va_end(words);
    line[length++] = '\n';
    (void)!write(1, line, length);
}

static void must(int ok, const char *what)
{
    if (ok)
        return;
    say("wrong %s: %s", what, strerror(errno));
    reboot(RB_POWER_OFF);
}

static long monotonic_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000L + now.tv_nsec / 1000000L;
}

static struct sockaddr_in address(const char *text, int port)
{
    struct sockaddr_in found = {.sin_family = AF_INET, .sin_port = htons(port)};
    inet_pton(AF_INET, text, &found.sin_addr);
    return found;
}

// The addresses of QEMU's user network.
static int network(int port)
{
    int sock = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
    struct ifreq interface = {0};
    struct sockaddr_in mine = address("10.0.2.15", 0), mask = address("255.255.255.0", 0), host = address("10.0.2.2", port);
    strcpy(interface.ifr_name, "eth0");
    memcpy(&interface.ifr_addr, &mine, sizeof mine);
    must(ioctl(sock, SIOCSIFADDR, &interface) == 0, "address of eth0");
    memcpy(&interface.ifr_netmask, &mask, sizeof mask);
    must(ioctl(sock, SIOCSIFNETMASK, &interface) == 0, "netmask of eth0");
    interface.ifr_flags = IFF_UP | IFF_RUNNING;
    must(ioctl(sock, SIOCSIFFLAGS, &interface) == 0, "eth0 up");
    must(connect(sock, (struct sockaddr *)&host, sizeof host) == 0, "socket to the host");
    return sock;
}

static int host_port(void)
{
    char line[1024] = {0};
    int fd = open("/proc/cmdline", O_RDONLY);
    must(fd >= 0 && read(fd, line, sizeof line - 1) > 0, "command line");
    close(fd);
    char *word = strstr(line, " port=");
    return word ? atoi(word + 6) : 0;
}

// Return how many numbers a log holds, all of them in order; -1 when one is not.
static long count(int log)
{
    char record[RECORD + 1] = {0};
    long number = 0;
    while (pread(log, record, RECORD, number * RECORD) == RECORD)
        if (atol(record) != ++number)
            return -1;
    return number;
}

static void end(int log, int how)
{
    int caches = open("/proc/sys/vm/drop_caches", O_WRONLY);
    sync();
    must(caches >= 0 && write(caches, "3", 1) == 1, "dropping the caches");
    say("end log %ld", count(log));
    close(log);
    must(mount("", "/", "", MS_REMOUNT | MS_RDONLY, "") == 0, "the disk at the end");
    reboot(how);
}

static void suspend(void)
{
    int state = open("/sys/power/state", O_WRONLY | O_CLOEXEC);
    say("sleeps");
    must(state >= 0 && write(state, "mem", 3) == 3, "suspend to RAM");
    close(state);
}

int main(void)
{
    char id[64] = {0}, record[32], answer[32];
    must(mount("proc", "/proc", "proc", 0, "") == 0, "/proc");
    must(mount("sysfs", "/sys", "sysfs", 0, "") == 0, "/sys");
    int boot_id = open("/proc/sys/kernel/random/boot_id", O_RDONLY);
    must(boot_id >= 0 && read(boot_id, id, 36) == 36, "boot id");
    int log = open("/log", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    must(log >= 0, "/log");
    long number = count(log), echoed = 0, before = monotonic_ms();
    int ending = 0, sleepy = 0;
    say("boot %s log %ld", id, number);
    int host = network(host_port());
    for (;;) {
        struct timespec pause = {.tv_nsec = TICK_MS * 1000000L};
        nanosleep(&pause, NULL);
        snprintf(record, sizeof record, "%015ld\n", ++number);
        must(pwrite(log, record, RECORD, (number - 1) * RECORD) == RECORD, "write");
        must(fdatasync(log) == 0, "fdatasync");
        send(host, record, RECORD - 1, 0); // a datagram may be lost
        ssize_t length;
        while ((length = recv(host, answer, sizeof answer - 1, 0)) > 0) {
            answer[length] = 0;
            if (strcmp(answer, "end") == 0)
                ending = RB_POWER_OFF;
            else if (strcmp(answer, "again") == 0)
                ending = RB_AUTOBOOT;
            else if (strcmp(answer, "sleep") == 0)
                sleepy = 1;
            else
                echoed = atol(answer);
        }
        long now = monotonic_ms();
        if (now < before || now - before > LONGEST_STEP_MS)
            say("wrong clock: %ld ms after %ld ms", now, before);
        before = now;
        say("tick %ld mono %ld echo %ld", number, now, echoed);
        if (ending)
            end(log, ending);
        if (sleepy) {
            suspend();
            sleepy = 0;
            before = monotonic_ms();
        }
    }
}
