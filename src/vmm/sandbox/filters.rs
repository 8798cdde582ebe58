//! The system calls of each filter. Kept short, because the kernel checks and loads them instruction by instruction;
//! arguments are looked at where they decide between harmless and not.
use std::collections::BTreeMap;

use seccompiler::SeccompCmpArgLen::{Dword, Qword};
use seccompiler::{
    BpfProgram, Error, SeccompAction, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use super::Filter;

/// A call with what must hold of its arguments: one of the rows; no row means any. The last of several counts.
type Call = (libc::c_long, Vec<Vec<SeccompCondition>>);

/// KVM's requests share a type byte (_IOC_TYPE in include/uapi/asm-generic/ioctl.h).
const IOCTL_TYPE: u64 = 0xff00;
const KVM_TYPE: u64 = 0xae00;
/// include/uapi/linux/kvm.h.
const KVM_RUN: u64 = 0xae80;
const KVM_IOEVENTFD: u64 = 0x4040_ae79;
const KVM_IRQFD: u64 = 0x4020_ae76;
const KVM_KVMCLOCK_CTRL: u64 = 0xaead;
const KVM_SET_GSI_ROUTING: u64 = 0x4008_ae6a;
const KVM_GET_DIRTY_LOG: u64 = 0x4010_ae42;
const KVM_CLEAR_DIRTY_LOG: u64 = 0xc018_aec0;
const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
/// Asking for what was written, and no longer.
const DIRTY_LOG: [u64; 3] = [KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG, KVM_SET_USER_MEMORY_REGION];
/// include/uapi/linux/userfaultfd.h.
const UFFD_TYPE: u64 = 0xaa00;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_COPY: u64 = 0xc028_aa03;
const UFFDIO_ZEROPAGE: u64 = 0xc020_aa04;
const UFFDIO_UNREGISTER: u64 = 0x8010_aa01;
const UFFDIO_WAKE: u64 = 0x8010_aa02;
const UFFDIO_WRITEPROTECT: u64 = 0xc018_aa06;
/// Having pages waited for that are owed, and putting them there.
const OWED: [u64; 5] = [UFFDIO_REGISTER, UFFDIO_COPY, UFFDIO_ZEROPAGE, UFFDIO_UNREGISTER, UFFDIO_WAKE];
/// include/uapi/linux/if_tun.h.
const TUNGETIFF: u64 = 0x8004_54d2;
const TUNGETVNETHDRSZ: u64 = 0x8004_54d7;
const TUNSETOFFLOAD: u64 = 0x4004_54d0;

/// What pthread_create asks of clone: a thread of this process, and never a namespace of its own.
const THREAD_FLAGS: i32 = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID;

/// Compiles a filter.
pub(super) fn compile(filter: Filter) -> Result<BpfProgram, Error> {
    let (calls, listed, other) = match filter {
        Filter::NoClone3 => (any(&[libc::SYS_clone3]), absent(), SeccompAction::Allow),
        Filter::NoRings => {
            (any(&[libc::SYS_io_uring_setup, libc::SYS_io_uring_register]), absent(), SeccompAction::Allow)
        }
        allowing => (calls(allowing)?, SeccompAction::Allow, SeccompAction::KillProcess),
    };
    let mut rules = BTreeMap::new();
    for (number, rows) in calls {
        let rows = rows.into_iter().map(SeccompRule::new).collect::<Result<Vec<_>, _>>()?;
        rules.insert(number, rows);
    }
    Ok(SeccompFilter::new(rules, other, listed, TargetArch::x86_64)?.try_into()?)
}

fn absent() -> SeccompAction {
    SeccompAction::Errno(libc::ENOSYS as u32)
}

fn calls(filter: Filter) -> Result<Vec<Call>, Error> {
    let mut calls = every_thread()?;
    match filter {
        Filter::Control => {
            calls.extend(new_thread()?);
            calls.extend(any(SHARED_BY_DEVICES));
            calls.extend(any(BLOCK));
            calls.extend(any(NET));
            calls.extend(any(BALLOON));
            calls.extend(any(SAVE));
            calls.extend(any(&[
                libc::SYS_recvmsg,
                libc::SYS_sendmsg,
                libc::SYS_accept4,
                libc::SYS_shutdown,
                libc::SYS_memfd_create,
                libc::SYS_fstat,
                libc::SYS_newfstatat,
                libc::SYS_pread64,
                libc::SYS_sync_file_range,
            ]));
            let commands = [
                libc::F_GETFD,
                libc::F_SETFD,
                libc::F_GETFL,
                libc::F_SETFL,
                libc::F_DUPFD_CLOEXEC,
                libc::F_ADD_SEALS,
                libc::F_GET_SEALS,
            ];
            let commands = commands.map(|command| u64::from(command.unsigned_abs()));
            calls.push((libc::SYS_fcntl, one_of(1, &commands)?));
            let requests = [TUNGETIFF, TUNGETVNETHDRSZ, TUNSETOFFLOAD, libc::FIONBIO];
            let mut rows = one_of(1, &requests)?;
            rows.push(vec![masked(1, IOCTL_TYPE, KVM_TYPE)?]);
            rows.push(vec![masked(1, IOCTL_TYPE, UFFD_TYPE)?]);
            calls.push((libc::SYS_ioctl, rows));
        }
        Filter::Vcpu => {
            calls.extend(new_thread()?);
            calls.extend(any(SHARED_BY_DEVICES));
            calls.extend(any(BLOCK));
            calls.extend(any(NET));
            calls.extend(any(BALLOON));
            let requests =
                [KVM_RUN, KVM_IOEVENTFD, KVM_IRQFD, KVM_KVMCLOCK_CTRL, KVM_SET_GSI_ROUTING, TUNSETOFFLOAD];
            calls.push((libc::SYS_ioctl, one_of(1, &requests)?));
        }
        Filter::Block => {
            calls.extend(any(SHARED_BY_DEVICES));
            calls.extend(any(BLOCK));
        }
        Filter::Net => {
            calls.extend(any(SHARED_BY_DEVICES));
            calls.extend(any(NET));
        }
        Filter::Balloon => {
            calls.extend(any(SHARED_BY_DEVICES));
            calls.extend(any(BALLOON));
        }
        Filter::Save => {
            calls.extend(any(SAVE));
            let requests = [UFFDIO_WRITEPROTECT, UFFDIO_UNREGISTER, UFFDIO_WAKE];
            calls.push((libc::SYS_ioctl, one_of(1, &requests)?));
        }
        Filter::Move => {
            calls.extend(any(MOVE));
            calls.push((libc::SYS_ioctl, one_of(1, &[&DIRTY_LOG[..], &OWED].concat())?));
        }
        Filter::Settle => {
            calls.extend(any(SETTLE));
            calls.push((libc::SYS_ioctl, one_of(1, &DIRTY_LOG)?));
        }
        Filter::Copy => calls.extend(any(COPY)),
        Filter::Rng | Filter::NoClone3 | Filter::NoRings => calls.extend(any(SHARED_BY_DEVICES)),
    }
    Ok(calls)
}

/// What no thread can do without: memory, locks, time, its own end. Also how a panic writes its last words.
fn every_thread() -> Result<Vec<Call>, Error> {
    let mut calls = any(&[
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_pwrite64,
        // Whether a last will is written already.
        libc::SYS_statx,
        libc::SYS_close,
        libc::SYS_futex,
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_madvise,
        libc::SYS_brk,
        // An abort takes the handler of its signal away.
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_sigaltstack,
        libc::SYS_clock_gettime,
        libc::SYS_sched_yield,
        libc::SYS_restart_syscall,
        libc::SYS_getrandom,
        libc::SYS_getpid,
        libc::SYS_gettid,
        // A namespace of its own is all a signal reaches.
        libc::SYS_tgkill,
        libc::SYS_exit,
        libc::SYS_exit_group,
    ]);
    // Memory is never executable: what a guest writes cannot become our code.
    calls.push((libc::SYS_mmap, vec![vec![without(2, libc::PROT_EXEC)?]]));
    calls.push((libc::SYS_mprotect, vec![vec![without(2, libc::PROT_EXEC)?]]));
    // The standard library looks whether a descriptor it closes was open.
    calls.push((libc::SYS_fcntl, one_of(1, &[u64::from(libc::F_GETFD.unsigned_abs())])?));
    Ok(calls)
}

/// What it takes to start a thread, and to be one that has not put on its own filter yet.
fn new_thread() -> Result<Vec<Call>, Error> {
    let mut calls = any(&[
        // Answered by `Filter::NoClone3` and `Filter::NoRings`.
        libc::SYS_clone3,
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_register,
        libc::SYS_rseq,
        libc::SYS_set_robust_list,
        libc::SYS_sched_getaffinity,
        libc::SYS_epoll_create1,
        libc::SYS_eventfd2,
        libc::SYS_timerfd_create,
        // Adds filters and takes none away.
        libc::SYS_seccomp,
    ]);
    calls.push((libc::SYS_clone, vec![vec![equal(0, u64::from(THREAD_FLAGS.unsigned_abs()))?]]));
    let options = [libc::PR_SET_NAME, libc::PR_SET_NO_NEW_PRIVS];
    calls.push((libc::SYS_prctl, one_of(0, &options.map(|option| u64::from(option.unsigned_abs())))?));
    Ok(calls)
}

/// Waiting.
const SHARED_BY_DEVICES: &[libc::c_long] = &[
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_ctl,
    libc::SYS_timerfd_settime,
    libc::SYS_poll,
];

/// A ring, or the plain calls where the kernel has none; and what it takes to copy a block up and to find what an overlay has.
const BLOCK: &[libc::c_long] = &[
    libc::SYS_io_uring_enter,
    libc::SYS_pread64,
    libc::SYS_lseek,
    libc::SYS_preadv,
    libc::SYS_pwritev2,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
];

const NET: &[libc::c_long] = &[libc::SYS_readv, libc::SYS_writev];

/// Giving pages back.
const BALLOON: &[libc::c_long] = &[libc::SYS_fallocate];

/// Writing a file that has no length yet, finding what of memory is in use, waiting for writers.
const SAVE: &[libc::c_long] = &[libc::SYS_ftruncate, libc::SYS_fdatasync, libc::SYS_lseek, libc::SYS_poll];

/// Beside reading and writing: waiting, what of memory and disks is in use, giving it back, reading at a place, making
/// durable, ending a stream.
const MOVE: &[libc::c_long] = &[
    libc::SYS_poll,
    libc::SYS_lseek,
    libc::SYS_fallocate,
    libc::SYS_pread64,
    libc::SYS_fdatasync,
    libc::SYS_shutdown,
];

/// Giving pages back that are zero again, and finding where a piece holds something; reading a disk's backing file, and writing
/// down what was filled in.
const SETTLE: &[libc::c_long] = &[
    libc::SYS_fallocate,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_sync_file_range,
    libc::SYS_fdatasync,
];

/// Finding where a disk holds something, and reading it.
const COPY: &[libc::c_long] = &[libc::SYS_lseek, libc::SYS_pread64];

fn any(numbers: &[libc::c_long]) -> Vec<Call> {
    numbers.iter().map(|number| (*number, Vec::new())).collect()
}

fn equal(argument: u8, value: u64) -> Result<SeccompCondition, Error> {
    Ok(SeccompCondition::new(argument, Dword, SeccompCmpOp::Eq, value)?)
}

/// Rows that say: the argument is one of these.
fn one_of(argument: u8, values: &[u64]) -> Result<Vec<Vec<SeccompCondition>>, Error> {
    values.iter().map(|value| Ok(vec![equal(argument, *value)?])).collect()
}

fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompCondition, Error> {
    Ok(SeccompCondition::new(argument, Dword, SeccompCmpOp::MaskedEq(mask), value)?)
}

fn without(argument: u8, bits: i32) -> Result<SeccompCondition, Error> {
    Ok(SeccompCondition::new(argument, Qword, SeccompCmpOp::MaskedEq(u64::from(bits.unsigned_abs())), 0)?)
}
