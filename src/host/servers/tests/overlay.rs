//! Clones whose disks are overlays, on fakes and a file system that shares no blocks: what they are made of, what reads them, and what they
//! become.
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use model::server::{DeleteServer, Server, ServerAction, ServerState};
use model::snapshot::{CreateClones, CreateSnapshot, RestoreServer, Snapshot};
use model::volume::{FillMethod, PatchVolume, Volume};
use model::{Code, Labels, ServerId};

use super::settle::{SETTLE, act, can_settle, clone};
use super::snapshot::{DieAt, backing, disk, named, taken, volume};
use super::{START, delete, delete_snapshot, nothing_left, stop};
use crate::stage::{SOON, Stage, created, ended, keyed, server, succeeded, until};
use crate::volumes::limits::RESERVE_BYTES;
use crate::volumes::overlay::shares_blocks;
use crate::volumes::space;
use crate::{Call, Host};

async fn of_volume(host: &Host, server: &Server) -> Volume {
    host.volumes().one(server.volumes[0].volume_id).await.unwrap()
}

async fn clones(host: &Host, snapshot: &Snapshot, name: &str, count: u16) -> Vec<Server> {
    let spec = CreateClones { name: name.parse().unwrap(), count, labels: Labels::default() };
    let made = host.servers().clone_snapshot(&Call::by_host(), snapshot.id, spec).await.unwrap().body;
    let mut clones = Vec::new();
    for item in &made.items {
        succeeded(host, item.operation.as_ref().unwrap().id).await;
        clones.push(host.servers().one(item.server_id).await.unwrap());
    }
    clones
}

async fn done(host: &Host, id: ServerId, action: ServerAction) -> Server {
    succeeded(host, act(host, id, action).await).await;
    host.servers().one(id).await.unwrap()
}

/// What a guest writes: whole blocks.
fn write(stage: &Stage, server: &Server, block: u64, word: &[u8]) {
    let mut bytes = vec![0; 4096];
    bytes[..word.len()].copy_from_slice(word);
    let file = File::options().write(true).open(volume(stage, server)).unwrap();
    file.write_all_at(&bytes, block * 4096).unwrap();
}

fn word(bytes: &[u8], block: usize) -> &[u8] {
    bytes[block * 4096..].split(|byte| *byte == 0).next().unwrap()
}

/// Whether the stage's file system has no blocks shared; what is tried here is of no concern to others.
fn copies(stage: &Stage) -> bool {
    !shares_blocks(&stage.state_dir(), &stage.state_dir()).unwrap_or_default()
}

/// A server with something on its disk, a snapshot of it, and two clones.
async fn cloned(stage: &Stage, host: &Host) -> (Server, Snapshot, Vec<Server>) {
    let first = created(host, server("web1")).await;
    write(stage, &first, 100, b"then");
    let snapshot = taken(host, first.id, named("then", true)).await;
    write(stage, &first, 100, b"since");
    let clones = clones(host, &snapshot, "twin", 2).await;
    (first, snapshot, clones)
}

#[tokio::test]
async fn a_clones_disk_takes_no_room_and_outlives_what_it_was_made_of() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    if !copies(&stage) {
        return;
    }
    let (first, snapshot, clones) = cloned(&stage, &host).await;
    let wanted = disk(&stage, &clones[0]);
    assert_eq!(word(&wanted, 100), b"then");
    for clone in &clones {
        let found = of_volume(&host, clone).await;
        assert_eq!((found.filled_by, found.used_bytes), (Some(FillMethod::Overlay), 0));
        assert_eq!(backing(&stage, clone).metadata().unwrap().nlink(), 3);
        assert!(can_settle(clone));
    }
    // Every one that shares is another's.
    write(&stage, &clones[0], 100, b"one");
    write(&stage, &clones[1], 0, b"two");
    delete(&host, first.id).await;
    delete_snapshot(&host, snapshot.id).await;
    assert_eq!(word(&disk(&stage, &clones[0]), 100), b"one");
    let other = disk(&stage, &clones[1]);
    assert!(word(&other, 0) == b"two" && other[4096..] == wanted[4096..]);
    // It starts again with both files, in whatever daemon, and can grow.
    let off = done(&host, clones[0].id, stop(0)).await;
    let grown = PatchVolume { size_bytes: Some(4 << 20), ..PatchVolume::default() };
    host.volumes().patch(&Call::by_host(), off.volumes[0].volume_id, grown).await.unwrap();
    host.close().await;
    drop(host);
    let host = stage.open().await;
    let again = done(&host, off.id, START).await;
    assert!(again.shares_memory_of.is_none() && can_settle(&again));
    let whole = disk(&stage, &again);
    assert!(whole.len() == 4 << 20 && whole[(1 << 20)..].iter().all(|byte| *byte == 0));
    let specs: Vec<_> = stage.launch.of_servers().into_iter().filter_map(|vmm| vmm.spec()).collect();
    assert!(specs.len() == 2 && specs.iter().all(|spec| spec.disks[0].backing.is_some()));
    // It takes what nobody else has, until it goes.
    delete(&host, clones[1].id).await;
    let found = of_volume(&host, &again).await;
    assert!(found.used_bytes > 4096 && found.filled_by == Some(FillMethod::Overlay), "{found:?}");
    let kept = DeleteServer { keep_volumes: true };
    let deleted = host.servers().delete(&Call::by_host(), again.id, kept).await.unwrap().body;
    succeeded(&host, deleted.operation.id).await;
    assert_eq!(word(&disk(&stage, &again), 100), b"one");
    let deleted = host.volumes().delete(&Call::by_host(), found.id).await.unwrap().body;
    succeeded(&host, deleted.operation.id).await;
    assert!(!backing(&stage, &again).exists());
    nothing_left(&stage, &host).await;
    host.close().await;
}

#[tokio::test]
async fn a_disk_that_is_settled_is_its_own_and_lets_go_only_then() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let (_, _, clones) = cloned(&stage, &host).await;
    let [one, two] = [&clones[0], &clones[1]];
    write(&stage, one, 3, b"mine");
    let wanted = disk(&stage, one);
    let settled = done(&host, one.id, SETTLE).await;
    let found = of_volume(&host, &settled).await;
    assert!(found.filled_by != Some(FillMethod::Overlay) && !can_settle(&settled));
    assert!(!backing(&stage, one).exists());
    assert!(std::fs::read(volume(&stage, one)).unwrap() == wanted);
    // Of one that has booted since there is only a disk to settle.
    done(&host, two.id, stop(0)).await;
    let two = done(&host, two.id, START).await;
    assert_eq!((two.shares_memory_of, can_settle(&two)), (None, copies(&stage)));
    let wanted = disk(&stage, &two);
    let two = done(&host, two.id, ServerAction::UpgradeVmm).await;
    assert!(!can_settle(&two) && !backing(&stage, &two).exists());
    assert!(std::fs::read(volume(&stage, &two)).unwrap() == wanted);
    assert_eq!(stage.launch.violations(), Vec::<String>::new());
    host.close().await;
}

#[tokio::test]
async fn a_file_that_a_disk_lets_go_of_is_removed_by_the_next_daemon_where_one_dies() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    if !copies(&stage) {
        return;
    }
    let (clone, ..) = clone(&stage, &host).await;
    let wanted = disk(&stage, &clone);
    host.close().await;
    drop(host);
    let host = stage.open_watched(Arc::new(DieAt("server.disks_settled"))).await.unwrap();
    let call = keyed("settle");
    let settling = host.servers().act(&call, clone.id, SETTLE).await.unwrap().body.operation.id;
    while !host.is_dead() {
        tokio::task::yield_now().await;
    }
    host.close().await;
    drop(host);
    assert!(backing(&stage, &clone).exists());
    let host = stage.open().await;
    assert!(!backing(&stage, &clone).exists());
    succeeded(&host, settling).await;
    assert!(std::fs::read(volume(&stage, &clone)).unwrap() == wanted);
    let settled = host.servers().one(clone.id).await.unwrap();
    assert!(!can_settle(&settled));
    assert_eq!(of_volume(&host, &settled).await.filled_by, Some(FillMethod::SparseCopy));
    host.close().await;
}

#[tokio::test]
async fn a_snapshot_of_a_clone_holds_all_of_its_disk() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let (_, _, mut made) = cloned(&stage, &host).await;
    let clone = made.remove(0);
    write(&stage, &clone, 3, b"mine");
    let wanted = disk(&stage, &clone);
    let kept = |snapshot: &Snapshot| {
        let place = stage.state_dir().join("snapshots").join(snapshot.id.to_string()).join("disk0.raw");
        std::fs::read(place).unwrap()
    };
    let running = taken(&host, clone.id, named("runs", true)).await;
    assert!(running.volumes[0].filled_by != Some(FillMethod::Overlay) && kept(&running) == wanted);
    let disks = taken(&host, clone.id, named("disks", false)).await;
    assert!(kept(&disks) == wanted);
    done(&host, clone.id, stop(0)).await;
    let off = taken(&host, clone.id, named("off", false)).await;
    assert!(kept(&off) == wanted);
    // A clone of the clone.
    let next = clones(&host, &running, "next", 1).await.remove(0);
    assert!(disk(&stage, &next) == wanted);
    host.close().await;
}

#[tokio::test]
async fn what_goes_back_is_whole() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let (_, _, mut made) = cloned(&stage, &host).await;
    let clone = made.remove(0);
    for memory in [false, true] {
        let wanted = disk(&stage, &clone);
        let name = format!("back-{memory}");
        taken(&host, clone.id, named(&name, memory)).await;
        write(&stage, &clone, 100, b"lost");
        let spec = RestoreServer { snapshot: name, stop: true };
        let asked = host.servers().restore(&Call::by_host(), clone.id, spec).await.unwrap().body;
        succeeded(&host, asked.operation.id).await;
        let back = until(&host, clone.id, |server| server.state == ServerState::Running).await;
        assert!(!backing(&stage, &clone).exists() && disk(&stage, &clone) == wanted);
        assert_ne!(of_volume(&host, &back).await.filled_by, Some(FillMethod::Overlay));
        assert_eq!(can_settle(&back), memory);
    }
    host.close().await;
}

#[tokio::test]
async fn of_a_disk_in_several_files_a_clone_has_a_copy_and_what_a_clone_needs_is_not_trimmed() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    if !copies(&stage) {
        return;
    }
    let (first, base, made) = cloned(&stage, &host).await;
    let wanted = disk(&stage, &made[0]);
    let thin = CreateSnapshot { incremental: true, ..named("thin", true) };
    let thin = taken(&host, first.id, thin).await;
    assert_eq!(thin.parent_id, Some(base.id));
    let copy = clones(&host, &thin, "copy", 1).await.remove(0);
    assert_eq!(of_volume(&host, &copy).await.filled_by, Some(FillMethod::SparseCopy));
    assert!(!backing(&stage, &copy).exists() && word(&disk(&stage, &copy), 100) == b"since");
    // Of the first one only some is needed by the second, and all by its clones.
    delete_snapshot(&host, base.id).await;
    let left = stage.state_dir().join("snapshots").join(base.id.to_string()).join("disk0.raw");
    assert!(left.exists() && disk(&stage, &made[0]) == wanted && disk(&stage, &made[1]) == wanted);
    let before = left.metadata().unwrap().blocks();
    for clone in made {
        delete(&host, clone.id).await;
    }
    let end = tokio::time::Instant::now() + SOON;
    while left.metadata().unwrap().blocks() == before {
        assert!(tokio::time::Instant::now() < end, "it is not trimmed");
        tokio::task::yield_now().await;
    }
    host.close().await;
}

#[tokio::test]
async fn a_clone_whose_file_is_gone_is_not_started_on_what_is_left() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    if !copies(&stage) {
        return;
    }
    let (clone, ..) = clone(&stage, &host).await;
    done(&host, clone.id, stop(0)).await;
    std::fs::remove_file(backing(&stage, &clone)).unwrap();
    let operation = ended(&host, act(&host, clone.id, START).await).await;
    let detail = operation.error.unwrap().detail;
    assert!(detail.contains("was made from"), "{detail}");
    host.close().await;
}

/// On a small file system of its own, in memory.
#[test]
fn a_disk_that_would_not_fit_is_not_settled() {
    use nix::sched::{CloneFlags, unshare};
    use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
    let work = std::thread::spawn(|| {
        if let Err(cause) = unshare(CloneFlags::CLONE_NEWNS) {
            eprintln!("skipped: a small file system of the test's own needs root ({cause})");
            return;
        }
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        let stage = Stage::new();
        std::fs::create_dir(stage.state_dir()).unwrap();
        let options = Some(c"size=200m,mode=700");
        mount("toft-test", stage.state_dir(), "tmpfs", MountFlags::empty(), options).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(no_room(&stage));
        drop(runtime);
        unmount(stage.state_dir(), UnmountFlags::DETACH).unwrap();
    });
    work.join().unwrap();
}

async fn no_room(stage: &Stage) {
    let host = stage.open_with_image().await;
    let (_, _, mut made) = cloned(stage, &host).await;
    let clone = made.remove(0);
    assert_eq!(of_volume(&host, &clone).await.filled_by, Some(FillMethod::Overlay), "tmpfs tells holes");
    let wanted = disk(stage, &clone);
    let filler = stage.state_dir().join("filler");
    let free = space::look(&stage.state_dir()).unwrap().free_bytes;
    std::fs::write(&filler, vec![1; (free - RESERVE_BYTES) as usize]).unwrap();
    let problem = ended(&host, act(&host, clone.id, SETTLE).await).await.error.unwrap();
    assert_eq!(problem.code, Code::DiskFull);
    assert!(
        problem.detail.contains("the disks have") && problem.detail.contains("do not fit"),
        "{problem:?}"
    );
    let here = host.servers().one(clone.id).await.unwrap();
    assert!(here.state == ServerState::Running && can_settle(&here) && disk(stage, &clone) == wanted);
    std::fs::remove_file(filler).unwrap();
    done(&host, clone.id, SETTLE).await;
    assert!(!backing(stage, &clone).exists() && disk(stage, &clone) == wanted);
    host.close().await;
}
