//! What runs in the jail: it takes one order from its socket, tries, and says what came of it.
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};

use serde_json::Value;
use vmm::sandbox;

use crate::calls::{call, open_through_ring, signed};

/// Its first argument, by which it knows that it is meant to run.
pub(crate) const NAME: &str = "attacker";
/// The first argument of a program with the set-user-id bit that it executes.
pub(crate) const HEIR: &str = "heir";
/// Its arguments.
pub(crate) const ARGUMENTS: [&str; 5] =
    ["--exact", "attacker::attacker", "--ignored", "--nocapture", "--test-threads=1"];
/// Where its socket is: the number at which a VMM has its control socket.
pub(crate) const SOCKET: i32 = wire::launch::fd::CONTROL;

/// Where a file of the host is that some are given: the number at which a VMM has its last will.
pub(crate) const GIVEN: i32 = wire::launch::fd::WILL;

/// Runs in the jail only.
#[test]
#[ignore = "what the other tests start inside the jail"]
fn attacker() {
    let name = std::env::args().next().unwrap_or_default();
    if name != NAME && name != HEIR {
        return;
    }
    // As a file: what a socket's own calls are is not known to every filter.
    let mut socket = File::from(sys::inherited::take(SOCKET).unwrap());
    if name == HEIR {
        let (euid, egid) = (nix::unistd::geteuid(), nix::unistd::getegid());
        let text = if euid.is_root() {
            format!("got euid {euid} egid {egid}")
        } else {
            format!("refused as {euid}")
        };
        return socket.write_all(text.as_bytes()).unwrap();
    }
    let mut order = [0; 4096];
    let length = socket.read(&mut order).unwrap();
    let order: Value = serde_json::from_slice(&order[..length]).unwrap();
    if order["landlock"] == true {
        sandbox::forbid_files_and_network().unwrap();
    }
    if let Some(thread) = order["thread"].as_str() {
        close(thread);
    }
    let answer = match attack(&order, &socket) {
        Ok(what) => format!("got {what}"),
        Err(cause) => format!("refused {cause}"),
    };
    socket.write_all(answer.as_bytes()).unwrap();
    if order["then"] == "wait" {
        let _ = socket.read(&mut [0]);
    }
}

/// Closes what a VMM's thread of this kind closes behind itself, by the same functions and in the same order.
fn close(thread: &str) {
    assert!(sandbox::close_process().seccomp, "the kernel filters");
    if thread == "main" {
        return;
    }
    sandbox::close_rings().unwrap();
    match thread {
        "main with a machine" => {}
        "vcpu" => sandbox::close_vcpu(),
        "save" => sandbox::close_save(),
        "settle" => sandbox::close_settle(),
        // Started by the vCPU whose guest has set its driver to work.
        device => {
            sandbox::close_vcpu();
            sandbox::close_device(device);
        }
    }
}

fn attack(order: &Value, socket: &File) -> io::Result<String> {
    let text = |name: &str| order[name].as_str().unwrap_or_default().to_owned();
    let path = || CString::new(text("path")).unwrap();
    let number = |name: &str| order[name].as_i64().unwrap_or_default() as i32;
    match text("attack").as_str() {
        "nothing" => Ok("nothing".to_owned()),
        "stay" => Ok(format!("{}", std::process::id())),
        "open" => content(File::open(text("path"))?),
        "open_upwards" => {
            std::env::set_current_dir("/")?;
            content(File::open(format!("../../../..{}", text("path")))?)
        }
        "open_for_writing" => File::options().write(true).open(text("path")).map(|_| "it".to_owned()),
        "create" => File::create(text("path")).map(|_| "a file".to_owned()),
        "open_through_ring" => {
            // `/proc/self/fd` may be missing, so the number is duplicated instead of opened again.
            let fd = open_through_ring(&path())?;
            let mut data = [0_u8; 16];
            let count = call(libc::SYS_read, &[signed(fd), data.as_mut_ptr() as usize, data.len()])?;
            Ok(String::from_utf8_lossy(&data[..count]).into_owned())
        }
        "open_inherited" => {
            // A directory that was left open leads out, however deep the root is buried.
            for fd in 4..1024 {
                let upwards = CString::new(format!("../../../../../../..{}", text("path"))).unwrap();
                let opened = call(libc::SYS_openat, &[fd, upwards.as_ptr() as usize, 0]);
                if opened.is_ok() {
                    return Ok(format!("through descriptor {fd}"));
                }
            }
            Err(io::Error::from_raw_os_error(libc::EBADF))
        }
        "list" => Ok(std::fs::read_dir(text("path"))?.next().map_or_else(
            || Err(io::Error::from_raw_os_error(libc::ENOENT)),
            |entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()),
        )?),
        "connect_path" => UnixStream::connect(text("path")).map(|_| "a connection".to_owned()),
        "connect_abstract" => {
            let address = SocketAddr::from_abstract_name(text("name"))?;
            UnixStream::connect_addr(&address).map(|_| "a connection".to_owned())
        }
        "connect_inet" => std::net::TcpStream::connect(text("address")).map(|_| "a connection".to_owned()),
        "raw_packets" => {
            let (family, kind) = (signed(libc::AF_INET), signed(libc::SOCK_RAW));
            call(libc::SYS_socket, &[family, kind, signed(libc::IPPROTO_ICMP)]).map(|_| "them".to_owned())
        }
        "trace" => {
            const PTRACE_SEIZE: usize = 0x4206;
            call(libc::SYS_ptrace, &[PTRACE_SEIZE, signed(number("pid"))]).map(|_| "the process".to_owned())
        }
        "signal" => call(libc::SYS_kill, &[signed(number("pid")), 0]).map(|_| "the process".to_owned()),
        "read_memory" => {
            let mut data = [0_u8; 8];
            let local = [data.as_mut_ptr() as usize, data.len()];
            let remote = [order["address"].as_u64().unwrap_or_default() as usize, data.len()];
            let (pid, local, remote) =
                (signed(number("pid")), local.as_ptr() as usize, remote.as_ptr() as usize);
            call(libc::SYS_process_vm_readv, &[pid, local, 1, remote, 1, 0])
                .map(|count| format!("{count} bytes"))
        }
        "take_descriptor" => {
            // This is how the KVM or the disk of another would be had.
            let pidfd = call(libc::SYS_pidfd_open, &[signed(number("pid")), 0])?;
            call(libc::SYS_pidfd_getfd, &[pidfd, signed(SOCKET), 0]).map(|_| "its socket".to_owned())
        }
        "hold_userfaultfd" => {
            // User mode only, which everybody may have; the number stays open until the process ends.
            const UFFD_USER_MODE_ONLY: usize = 1;
            call(libc::SYS_userfaultfd, &[UFFD_USER_MODE_ONLY]).map(|fd| fd.to_string())
        }
        "take_userfaultfd" => {
            let pidfd = call(libc::SYS_pidfd_open, &[signed(number("pid")), 0])?;
            let taken = call(libc::SYS_pidfd_getfd, &[pidfd, signed(number("descriptor")), 0])?;
            // include/uapi/linux/userfaultfd.h: the version, then what the kernel answers.
            const UFFDIO_API: usize = 0xc018_aa3f;
            let mut api = [0xaa_u64, 0, 0];
            call(libc::SYS_ioctl, &[taken, UFFDIO_API, api.as_mut_ptr() as usize])
                .map(|_| "the faults of the process".to_owned())
        }
        "enter_namespaces" => {
            let pidfd = call(libc::SYS_pidfd_open, &[signed(number("pid")), 0])?;
            let namespaces = (libc::CLONE_NEWNET | libc::CLONE_NEWIPC) as usize;
            call(libc::SYS_setns, &[pidfd, namespaces]).map(|_| "the host's namespaces".to_owned())
        }
        "open_by_handle" => {
            // Any file of the file system that one of its descriptors lies on, without a path (open_by_handle_at(2)).
            let words = order["handle"].as_array().into_iter().flatten();
            let handle: Vec<u32> = words.map(|word| word.as_u64().unwrap_or_default() as u32).collect();
            let arguments = [signed(GIVEN), handle.as_ptr() as usize, libc::O_RDONLY as usize];
            call(libc::SYS_open_by_handle_at, &arguments).map(|_| "a file of the host".to_owned())
        }
        "make_device" => {
            // The device of the host's memory, or, as here, a harmless one.
            let (mode, null) = ((libc::S_IFCHR | 0o666) as usize, libc::makedev(1, 3) as usize);
            call(libc::SYS_mknod, &[path().as_ptr() as usize, mode, null]).map(|_| "a device".to_owned())
        }
        "kernel_log" => {
            const SYSLOG_ACTION_READ_ALL: usize = 3;
            let mut text = [0_u8; 64];
            call(libc::SYS_syslog, &[SYSLOG_ACTION_READ_ALL, text.as_mut_ptr() as usize, text.len()])
                .map(|count| format!("{count} bytes"))
        }
        "userfaultfd" => {
            // Of its own memory, the kernel's accesses included: with it, a race in the kernel is easily won.
            call(libc::SYS_userfaultfd, &[0]).map(|_| "the kernel's faults".to_owned())
        }
        "mount" => {
            let (kind, target) = (c"tmpfs".as_ptr() as usize, c"/".as_ptr() as usize);
            call(libc::SYS_mount, &[kind, target, kind, 0, 0]).map(|_| "a file system".to_owned())
        }
        "make_writable" => {
            let flags = (libc::MS_REMOUNT | libc::MS_BIND) as usize;
            let root = c"/".as_ptr() as usize;
            call(libc::SYS_mount, &[0, root, 0, flags, 0]).map(|_| "a writable root".to_owned())
        }
        "unshare" => call(libc::SYS_unshare, &[libc::CLONE_NEWNS as usize]).map(|_| "a namespace".to_owned()),
        "chroot" => call(libc::SYS_chroot, &[c".".as_ptr() as usize]).map(|_| "another root".to_owned()),
        "become_root" => call(libc::SYS_setresuid, &[0, 0, 0]).map(|_| "root".to_owned()),
        "join_group" => {
            let group = [0_u32];
            call(libc::SYS_setgroups, &[1, group.as_ptr() as usize]).map(|_| "root's group".to_owned())
        }
        "heir" => {
            // A program of root's that gives its rights to whoever executes it.
            let name = CString::new(HEIR).unwrap();
            let rest = ARGUMENTS.map(|argument| CString::new(argument).unwrap());
            let mut arguments: Vec<*const libc::c_char> = vec![name.as_ptr()];
            arguments.extend(rest.iter().map(|argument| argument.as_ptr()));
            arguments.push(std::ptr::null());
            nix::fcntl::fcntl(socket, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()))?;
            let empty = [0_usize];
            let (list, nothing) = (arguments.as_ptr() as usize, empty.as_ptr() as usize);
            call(libc::SYS_execve, &[path().as_ptr() as usize, list, nothing]).map(|_| String::new())
        }
        "read_key" => {
            const KEYCTL_SEARCH: usize = 10;
            const SESSION: i32 = -3;
            let (kind, name) = (c"user".as_ptr() as usize, CString::new(text("name")).unwrap());
            let found = [KEYCTL_SEARCH, signed(SESSION), kind, name.as_ptr() as usize, 0];
            call(libc::SYS_keyctl, &found).map(|key| format!("key {key}"))
        }
        "shared_memory" => {
            call(libc::SYS_shmget, &[signed(number("key")), 0, 0]).map(|id| format!("segment {id}"))
        }
        "host_name" => {
            let mut names = [0_u8; 6 * 65];
            call(libc::SYS_uname, &[names.as_mut_ptr() as usize])?;
            let name = String::from_utf8_lossy(&names[65..130]).trim_end_matches('\0').to_owned();
            if name == text("name") { Ok(name) } else { Err(io::Error::other(format!("it is {name:?}"))) }
        }
        "exhaust_descriptors" => {
            let mut copies = Vec::new();
            for _ in 0..number("count") {
                copies.push(socket.try_clone()?);
            }
            Ok(format!("{} descriptors", copies.len()))
        }
        "exhaust_tasks" => {
            let mut threads = Vec::new();
            let gate = std::sync::Arc::new(std::sync::Barrier::new(number("count") as usize + 1));
            for _ in 0..number("count") {
                let gate = std::sync::Arc::clone(&gate);
                threads.push(std::thread::Builder::new().stack_size(64 << 10).spawn(move || gate.wait())?);
            }
            gate.wait();
            Ok(format!("{} threads", threads.len()))
        }
        "long_file" => {
            // The signal that comes with it would end the attacker before it can tell.
            const SIGXFSZ: i32 = libc::SIGXFSZ;
            let mask = [1_u64 << (SIGXFSZ - 1)];
            call(libc::SYS_rt_sigprocmask, &[0, mask.as_ptr() as usize, 0, 8])?;
            let memory =
                File::from(nix::sys::memfd::memfd_create("long", nix::sys::memfd::MFdFlags::empty())?);
            memory.set_len(order["bytes"].as_u64().unwrap_or_default()).map(|()| "it".to_owned())
        }
        "locked_memory" => {
            let memory = vec![0_u8; order["bytes"].as_u64().unwrap_or_default() as usize];
            call(libc::SYS_mlock, &[memory.as_ptr() as usize, memory.len()]).map(|_| "it".to_owned())
        }
        "user_namespace" => {
            // In a child, because a process with several threads keeps its own.
            let child = call(libc::SYS_clone, &[(libc::CLONE_NEWUSER | libc::SIGCHLD) as usize, 0, 0, 0, 0])?;
            if child == 0 {
                call(libc::SYS_exit_group, &[0])?;
            }
            Ok("a namespace of its own".to_owned())
        }
        other => panic!("no attack is called {other:?}"),
    }
}

fn content(mut file: File) -> io::Result<String> {
    let mut data = [0_u8; 16];
    let count = file.read(&mut data)?;
    Ok(String::from_utf8_lossy(&data[..count]).into_owned())
}
