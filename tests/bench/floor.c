// The floor: the least a program can do to start the probe guest on KVM, for comparison. No devices but the serial
// port's output, no walls, no checks of what the guest does. Not a VMM: nothing else in the project uses it.
//
//   floor KERNEL MEMORY_MIB CMDLINE      the guest's serial output goes to standard output
#include <elf.h>
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { START_INFO = 0x6000, MEMORY_MAP = 0x7000, CMDLINE = 0x20000, SERIAL = 0x3f8, LINE_STATUS = SERIAL + 5 };
enum { TRANSMITTER_EMPTY = 0x60, CPUID_MAX = 128, RAM = 1, PVH_NOTE = 18 };
enum { KVM_TSS = 0xfffbd000 };

static int call(int fd, unsigned long request, void *argument, const char *name) {
    int result = ioctl(fd, request, argument);
    if (result < 0)
        err(1, "%s", name);
    return result;
}
#define CALL(fd, request, argument) call(fd, request, (void *)(uintptr_t)(argument), #request)

// Puts the segments of the image where they belong and answers the entry of its PVH note.
static uint32_t load(const char *path, uint8_t *memory, size_t memory_bytes) {
    int file = open(path, O_RDONLY | O_CLOEXEC);
    struct stat about;
    if (file < 0 || fstat(file, &about) < 0)
        err(1, "%s", path);
    const uint8_t *image = mmap(NULL, about.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, file, 0);
    if (image == MAP_FAILED)
        err(1, "mmap");
    const Elf64_Ehdr *header = (const void *)image;
    const Elf64_Phdr *segment = (const void *)(image + header->e_phoff);
    uint32_t entry = 0;
    for (int i = 0; i < header->e_phnum; i++, segment++) {
        if (segment->p_type == PT_LOAD) {
            if (segment->p_paddr + segment->p_memsz > memory_bytes)
                errx(1, "the image does not fit");
            memcpy(memory + segment->p_paddr, image + segment->p_offset, segment->p_filesz);
        }
        const Elf64_Nhdr *note = (const void *)(image + segment->p_offset);
        if (segment->p_type == PT_NOTE && note->n_type == PVH_NOTE)
            entry = *(const uint32_t *)((const uint8_t *)(note + 1) + ((note->n_namesz + 3) & ~3u));
    }
    if (!entry)
        errx(1, "the image has no PVH note");
    return entry;
}

static void write_start_info(uint8_t *memory, size_t memory_bytes, const char *cmdline) {
    // include/xen/interface/hvm/start_info.h, version 1.
    struct {
        uint32_t magic, version, flags, modules;
        uint64_t module_list, cmdline, rsdp, memory_map;
        uint32_t entries, reserved;
    } info = {.magic = 0x336ec578, .version = 1, .cmdline = CMDLINE, .memory_map = MEMORY_MAP, .entries = 2};
    struct {
        uint64_t start, bytes;
        uint32_t kind, reserved;
    } map[] = {{0, 0xa0000, RAM, 0}, {0x100000, memory_bytes - 0x100000, RAM, 0}};
    memcpy(memory + START_INFO, &info, sizeof info);
    memcpy(memory + MEMORY_MAP, map, sizeof map);
    strcpy((char *)memory + CMDLINE, cmdline);
}

static void prepare(int vcpu, uint32_t entry) {
    struct kvm_sregs sregs;
    CALL(vcpu, KVM_GET_SREGS, &sregs);
    struct kvm_segment flat = {.limit = 0xffffffff, .selector = 0x18, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1};
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = flat;
    flat.selector = 0x10, flat.type = 11;
    sregs.cs = flat;
    sregs.cr0 = 0x11;
    sregs.cr4 = 0;
    CALL(vcpu, KVM_SET_SREGS, &sregs);
    struct kvm_regs regs = {.rip = entry, .rbx = START_INFO, .rflags = 2};
    CALL(vcpu, KVM_SET_REGS, &regs);
}

int main(int argc, char **argv) {
    if (argc != 4)
        errx(2, "usage: floor KERNEL MEMORY_MIB CMDLINE");
    size_t memory_bytes = strtoul(argv[2], NULL, 10) << 20;
    uint8_t *memory = mmap(NULL, memory_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        err(1, "mmap");

    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0)
        err(1, "/dev/kvm");
    int vm = CALL(kvm, KVM_CREATE_VM, 0);
    struct kvm_userspace_memory_region slot = {.memory_size = memory_bytes, .userspace_addr = (uintptr_t)memory};
    // Before the interrupt controllers: without a slot, making those waits for a grace period of the kernel.
    CALL(vm, KVM_SET_USER_MEMORY_REGION, &slot);
    CALL(vm, KVM_SET_TSS_ADDR, KVM_TSS);
    CALL(vm, KVM_CREATE_IRQCHIP, 0);
    int vcpu = CALL(vm, KVM_CREATE_VCPU, 0);
    int run_bytes = CALL(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    struct kvm_run *run = mmap(NULL, run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    if (run == MAP_FAILED)
        err(1, "mmap");
    static struct {
        struct kvm_cpuid2 header;
        struct kvm_cpuid_entry2 entries[CPUID_MAX];
    } cpuid = {.header.nent = CPUID_MAX};
    CALL(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid);
    CALL(vcpu, KVM_SET_CPUID2, &cpuid);

    uint32_t entry = load(argv[1], memory, memory_bytes);
    write_start_info(memory, memory_bytes, argv[3]);
    prepare(vcpu, entry);
    for (;;) {
        CALL(vcpu, KVM_RUN, 0);
        uint8_t *data = (uint8_t *)run + run->io.data_offset;
        size_t bytes = (size_t)run->io.size * run->io.count;
        if (run->exit_reason == KVM_EXIT_IO && run->io.direction == KVM_EXIT_IO_OUT) {
            if (run->io.port == SERIAL && write(STDOUT_FILENO, data, bytes) < 0)
                err(1, "write");
        } else if (run->exit_reason == KVM_EXIT_IO) {
            memset(data, run->io.port == LINE_STATUS ? TRANSMITTER_EMPTY : 0xff, bytes);
        } else if (run->exit_reason == KVM_EXIT_MMIO) {
            if (!run->mmio.is_write)
                memset(run->mmio.data, 0xff, sizeof run->mmio.data);
        } else {
            errx(1, "exit %u", run->exit_reason);
        }
    }
}
