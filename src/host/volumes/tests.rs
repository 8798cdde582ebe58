//! Volumes with records and directories of a host, and crashes at every point.
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use model::operation::OperationState;

use super::testing::{Place, ended};
use super::*;
use crate::images::testing::{DISK_BYTES, Sample};

const MIB: u64 = 1 << 20;

async fn opened(place: &Place) -> Volumes {
    let core = place.open().await;
    let images = Images::new(core.clone());
    images.recover().await.unwrap();
    let volumes = Volumes::new(core, images);
    volumes.recover().await.unwrap();
    volumes
}

async fn sample_image(volumes: &Volumes) -> ImageId {
    let spec =
        model::image::UploadImage { name: "sample".parse().unwrap(), sha256: None, length_bytes: None };
    let body = std::io::Cursor::new(Sample::new().bundle());
    let answer = volumes.images.upload(&Call::by_host(), spec, body).await.unwrap();
    answer.body.resource.unwrap().id
}

fn new(name: &str, size_bytes: u64, image_id: Option<ImageId>) -> NewVolume {
    let server_id = Some(ServerId::new());
    NewVolume {
        name: name.parse().unwrap(),
        labels: Labels::default(),
        size_bytes,
        image_id,
        snapshot_id: None,
        server_id,
        is_clone: false,
    }
}

async fn created(volumes: &Volumes, new: NewVolume) -> Result<Volume> {
    let maker = volumes.clone();
    volumes.core.store.write(move |tx| maker.create(tx, new)).await
}

/// Fills it as a server does, record and all.
async fn fill(
    volumes: &Volumes,
    id: VolumeId,
    cancelled: &(dyn Fn() -> bool + Send + Sync),
    progress: &(dyn Fn(u64, u64) + Send + Sync),
) -> Result<()> {
    let how = Fill { durability: Durability::Power, is_clone: false };
    let Some(filled) = volumes.fill(id, how, cancelled, progress).await? else { return Ok(()) };
    let dirs = volumes.core.dirs.clone();
    volumes.core.store.write(move |tx| Volumes::complete(tx, &filled, &dirs)).await
}

async fn filled(volumes: &Volumes, new: NewVolume) -> VolumeId {
    let id = created(volumes, new).await.unwrap().id;
    fill(volumes, id, &|| false, &|_, _| {}).await.unwrap();
    id
}

fn grown(size_bytes: u64) -> PatchVolume {
    PatchVolume { size_bytes: Some(size_bytes), ..PatchVolume::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_holds_its_images_bytes_and_is_as_large_as_asked() {
    let place = Place::new();
    let volumes = opened(&place).await;
    let image = sample_image(&volumes).await;
    let told = AtomicU64::new(0);
    let id = created(&volumes, new("web1", 8 * MIB, Some(image))).await.unwrap().id;
    fill(&volumes, id, &|| false, &|_, total| told.store(total, Ordering::Relaxed)).await.unwrap();
    fill(&volumes, id, &|| true, &|_, _| panic!("it was filled twice")).await.unwrap();
    let volume = volumes.one(id).await.unwrap();
    assert_eq!((volume.state, volume.size_bytes), (VolumeState::Ready, 8 * MIB));
    assert!(matches!(volume.filled_by, Some(FillMethod::Reflink | FillMethod::SparseCopy)));
    assert!(volume.used_bytes > 0 && volume.used_bytes < MIB, "{}", volume.used_bytes);
    let file = volumes.open(id, Content::Recorded).await.unwrap();
    let file = file.own;
    assert_eq!(file.metadata().unwrap().len(), 8 * MIB);
    let mut bytes = vec![0; DISK_BYTES];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == Sample::new().files[0].1, "the bytes differ");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_never_open_twice_and_the_lock_goes_with_the_last_copy() {
    let place = Place::new();
    let volumes = opened(&place).await;
    let id = filled(&volumes, new("web1", MIB, None)).await;
    let file = volumes.open(id, Content::Recorded).await.unwrap();
    assert_eq!(volumes.open(id, Content::Recorded).await.unwrap_err().code, Code::InUse);
    // What a VMM holds is a copy of the descriptor; the daemon's own is closed after it was sent.
    let copy = file.own.try_clone().unwrap();
    drop(file);
    assert_eq!(volumes.open(id, Content::Recorded).await.unwrap_err().code, Code::InUse);
    drop(copy);
    volumes.open(id, Content::Recorded).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_put_in_the_place_of_a_volumes_file_is_not_opened() {
    let place = Place::new();
    let volumes = opened(&place).await;
    let id = filled(&volumes, new("web1", MIB, None)).await;
    let file = volumes.core.dirs.volume(id);
    let elsewhere = tempfile::tempdir().unwrap();
    let (ours, secret) = (elsewhere.path().join("ours"), elsewhere.path().join("secret"));
    std::fs::rename(&file, &ours).unwrap();
    std::fs::write(&secret, "secret").unwrap();
    let pipe =
        |_: &Path, at: &Path| nix::unistd::mkfifo(at, nix::sys::stat::Mode::S_IRWXU).map_err(Into::into);
    type Swap<'s> = &'s dyn Fn(&Path, &Path) -> std::io::Result<()>;
    let swaps: [(&str, Swap<'_>); 3] = [
        ("a symbolic link", &|to, at| std::os::unix::fs::symlink(to, at)),
        ("a hard link", &|to, at| std::fs::hard_link(to, at)),
        ("a pipe", &pipe),
    ];
    for (what, swap) in swaps {
        swap(&secret, &file).unwrap();
        let refused =
            volumes.open(id, Content::Recorded).await.err().unwrap_or_else(|| panic!("{what} was opened"));
        assert!(refused.detail.contains("cannot open the file of volume"), "{what}: {refused:?}");
        std::fs::remove_file(&file).unwrap();
    }
    std::fs::rename(&ours, &file).unwrap();
    volumes.open(id, Content::Recorded).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_only_grows_and_only_while_nothing_has_it() {
    let place = Place::new();
    let volumes = opened(&place).await;
    let id = filled(&volumes, new("web1", MIB, None)).await;
    let call = Call::by_host();
    for bad in [MIB - 4096, MIB + 1, model::limits::VOLUME_BYTES_MAX + 4096] {
        let refused = volumes.patch(&call, id, grown(bad)).await.unwrap_err();
        assert_eq!(
            (refused.code, refused.errors[0].pointer.as_str()),
            (Code::Invalid, "/size_bytes"),
            "{bad}"
        );
    }
    let held = volumes.open(id, Content::Recorded).await.unwrap();
    assert_eq!(volumes.patch(&call, id, grown(2 * MIB)).await.unwrap_err().code, Code::InUse);
    drop(held);
    let answer = volumes.patch(&call, id, grown(2 * MIB)).await.unwrap();
    assert_eq!(answer.body.size_bytes, 2 * MIB);
    assert_eq!(volumes.open(id, Content::Recorded).await.unwrap().own.metadata().unwrap().len(), 2 * MIB);
    let huge = volumes.patch(&call, id, grown(model::limits::VOLUME_BYTES_MAX)).await.unwrap_err();
    assert_eq!(huge.code, Code::DiskFull);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_growth_that_a_crash_cut_off_is_made_good_at_the_next_opening() {
    let place = Place::new();
    let volumes = opened(&place).await;
    let id = filled(&volumes, new("web1", MIB, None)).await;
    let enlarge = move |tx: &Tx<'_>| {
        let mut volume: Volume = records::one(tx, id.0)?;
        volume.size_bytes = 3 * MIB;
        records::save(tx, &mut volume)
    };
    volumes.core.store.write(enlarge).await.unwrap();
    assert_eq!(volumes.open(id, Content::Recorded).await.unwrap().own.metadata().unwrap().len(), 3 * MIB);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_filling_leaves_no_file_and_can_be_begun_again() {
    let place = Place::new();
    let volumes = opened(&place).await;
    let image = sample_image(&volumes).await;
    let id = created(&volumes, new("web1", MIB, Some(image))).await.unwrap().id;
    // The copy of a small image may be done before anybody looks; both ends are right, nothing in between is.
    match fill(&volumes, id, &|| true, &|_, _| {}).await {
        Ok(()) => assert_eq!(place.names("volumes"), [format!("{id}.raw")]),
        Err(refused) => {
            assert_eq!(refused.code, Code::Draining);
            assert_eq!(place.names("volumes"), Vec::<String>::new());
        }
    }
    fill(&volumes, id, &|| false, &|_, _| {}).await.unwrap();
    assert_eq!(volumes.one(id).await.unwrap().state, VolumeState::Ready);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_disk_cannot_hold_is_refused_before_anything_is_recorded() {
    let place = Place::new();
    let volumes = opened(&place).await;
    let refused = created(&volumes, new("web1", model::limits::VOLUME_BYTES_MAX, None)).await.unwrap_err();
    assert_eq!(refused.code, Code::DiskFull);
    assert!(volumes.list(ListQuery::default()).await.unwrap().items.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_of_a_server_is_not_deleted_and_one_that_was_kept_is() {
    let place = Place::new();
    let volumes = opened(&place).await;
    let id = filled(&volumes, new("web1", MIB, None)).await;
    assert_eq!(volumes.delete(&Call::by_host(), id).await.unwrap_err().code, Code::InUse);
    for _ in 0..2 {
        volumes.core.store.write(move |tx| Volumes::detach(tx, id)).await.unwrap();
    }
    let answer = volumes.delete(&Call::by_host(), id).await.unwrap();
    assert_eq!(ended(&volumes.core, answer.body.operation.id).await.state, OperationState::Succeeded);
    assert_eq!(place.names("volumes"), Vec::<String>::new());
    assert_eq!(volumes.one(id).await.unwrap_err().code, Code::NotFound);
    volumes.purge(id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn only_files_of_ours_that_no_record_names_are_tidied_away() {
    let place = Place::new();
    let volumes = opened(&place).await;
    let id = filled(&volumes, new("web1", MIB, None)).await;
    let directory = place.directory.path().join("volumes");
    let stranger = VolumeId::new();
    for name in
        [format!("{stranger}.raw"), format!("{stranger}.raw.unfinished"), format!("{id}.raw.unfinished")]
    {
        std::fs::write(directory.join(name), "left by a crash").unwrap();
    }
    std::fs::write(directory.join("notes.txt"), "an operator's").unwrap();
    drop(volumes);
    opened(&place).await;
    assert_eq!(place.names("volumes"), [format!("{id}.raw"), "notes.txt".to_owned()]);
}

/// Ends the daemon's life after each step of filling, keeping and deleting a volume. The next life can go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_at_any_point_can_be_gone_on_from() {
    for point in 2..20 {
        let place = Place::new();
        let core = place.open_to_die_at(point).await;
        let volumes = Volumes::new(core.clone(), Images::new(core));
        let made = created(&volumes, new("web1", MIB, None)).await;
        let id = made.as_ref().ok().map(|volume| volume.id);
        let mut whole = false;
        if let Some(id) = id
            && fill(&volumes, id, &|| false, &|_, _| {}).await.is_ok()
            && volumes.core.store.write(move |tx| Volumes::detach(tx, id)).await.is_ok()
        {
            whole = volumes.purge(id).await.is_ok();
        }
        drop(volumes);
        let volumes = opened(&place).await;
        for volume in volumes.list(ListQuery::default()).await.unwrap().items {
            fill(&volumes, volume.id, &|| false, &|_, _| {}).await.unwrap();
            if place.names("volumes").is_empty() {
                // Its purge had removed the file; the record follows when it is asked for again.
                volumes.purge(volume.id).await.unwrap();
                continue;
            }
            assert_eq!(
                volumes.open(volume.id, Content::Recorded).await.unwrap().own.metadata().unwrap().len(),
                MIB,
                "point {point}"
            );
        }
        let recorded = volumes.list(ListQuery::default()).await.unwrap().items.len();
        assert_eq!(place.names("volumes").len(), recorded, "point {point}");
        if whole {
            assert!(point > 5, "a life has more points than that");
            return;
        }
    }
    panic!("no life was long enough");
}

/// As a loss of power leaves it: space that was given and never written, beside what was. What is read of that makes no data of it.
#[tokio::test(flavor = "multi_thread")]
async fn an_overlay_is_cleared_of_what_was_never_written_before_it_is_read() {
    let place = Place::new();
    let volumes = opened(&place).await;
    let id = filled(&volumes, new("data", 2 * MIB, None)).await;
    let over = move |tx: &Tx<'_>| {
        let mut volume: Volume = records::one(tx, id.0)?;
        volume.filled_by = Some(FillMethod::Overlay);
        records::save(tx, &mut volume)
    };
    volumes.core.store.write(over).await.unwrap();
    let path = volumes.core.dirs.volume(id);
    std::fs::write(overlay::backing(&path), vec![b'b'; MIB as usize]).unwrap();
    let own = File::options().read(true).write(true).truncate(true).open(&path).unwrap();
    own.set_len(2 * MIB).unwrap();
    rustix::fs::fallocate(&own, rustix::fs::FallocateFlags::KEEP_SIZE, 0, 256 << 10).unwrap();
    own.write_all_at(&[b'o'; 64 << 10], 0).unwrap();
    own.sync_all().unwrap();
    rustix::fs::fadvise(&own, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    drop(own);
    let layers = volumes.open(id, Content::Recorded).await.unwrap();
    let mut piece = [0; 64 << 10];
    // The kernel reads ahead of the first.
    for (at, byte) in [(0, b'o'), (64 << 10, b'b'), (128 << 10, b'b'), (MIB, 0)] {
        layers.read_exact_at(&mut piece, at).unwrap();
        assert!(piece == [byte; 64 << 10], "at {at}: {:?}", &piece[..4]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_an_overlay_needs_stays_with_it_and_no_longer() {
    let place = Place::new();
    let volumes = opened(&place).await;
    let over = filled(&volumes, new("over", MIB, None)).await;
    let whole = filled(&volumes, new("whole", MIB, None)).await;
    let making = created(&volumes, new("making", MIB, None)).await.unwrap().id;
    let doomed = filled(&volumes, new("doomed", MIB, None)).await;
    let recorded = move |tx: &Tx<'_>| {
        for id in [over, doomed] {
            let mut volume: Volume = records::one(tx, id.0)?;
            volume.filled_by = Some(FillMethod::Overlay);
            records::save(tx, &mut volume)?;
        }
        Ok(())
    };
    volumes.core.store.write(recorded).await.unwrap();
    let stranger = VolumeId::new();
    for id in [over, whole, making, doomed, stranger] {
        std::fs::write(overlay::backing(&volumes.core.dirs.volume(id)), "below").unwrap();
    }
    volumes.purge(doomed).await.unwrap();
    drop(volumes);
    let volumes = opened(&place).await;
    let mut wanted = [over, whole].map(|id| format!("{id}.raw")).to_vec();
    wanted.extend([over, making].map(|id| format!("{id}.raw.backing")));
    wanted.sort();
    assert_eq!(place.names("volumes"), wanted);
    // One that is made anew is whole.
    fill(&volumes, making, &|| false, &|_, _| {}).await.unwrap();
    assert_eq!(volumes.one(making).await.unwrap().filled_by, Some(FillMethod::Empty));
    assert!(!overlay::backing(&volumes.core.dirs.volume(making)).exists());
    // What takes the place of an overlay is whole.
    std::fs::write(files::beside(&volumes.core.dirs.volume(over)), [1; 4096]).unwrap();
    for _ in 0..2 {
        volumes.take_back(over).await.unwrap();
    }
    assert!(!overlay::backing(&volumes.core.dirs.volume(over)).exists());
    // Also where nobody says that it is back, as its server is deleted meanwhile.
    assert_eq!(volumes.one(over).await.unwrap().filled_by, Some(FillMethod::SparseCopy));
    drop(volumes.open(over, Content::Recorded).await.unwrap());
    let back = move |tx: &Tx<'_>| {
        let shown = SnapshotVolume { index: 0, size_bytes: MIB, filled_by: None };
        Volumes::is_back(tx, over, SnapshotId::new(), shown, MIB)
    };
    volumes.core.store.write(back).await.unwrap();
    assert_eq!(volumes.one(over).await.unwrap().filled_by, Some(FillMethod::SparseCopy));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_volumes_share_is_not_decided_by_an_error() {
    let place = Place::new();
    let volumes = opened(&place).await;
    let known = overlay::means(&volumes.core.dirs).unwrap();
    let [there, away] = ["volumes", "away"].map(|name| place.directory.path().join(name));
    std::fs::rename(&there, &away).unwrap();
    assert_eq!(volumes.means(), Means::Nothing);
    std::fs::rename(&away, &there).unwrap();
    assert_eq!(volumes.means(), known);
    // It is not looked for again.
    std::fs::rename(&there, &away).unwrap();
    assert_eq!(volumes.means(), known);
}
