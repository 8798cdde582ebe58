//! Clones whose disks are overlays, as they move: the other host has nothing of what they were made from.
use std::os::unix::fs::FileExt;

use model::server::{ServerAction, ServerState, StopServer};
use model::snapshot::{CreateClones, CreateSnapshot};
use model::volume::FillMethod;

use super::moves::{Ground, has, listening};
use super::*;

#[tokio::test]
async fn a_disk_that_lies_in_two_files_comes_whole() {
    for is_off in [true, false] {
        let ground = Ground::with(ServerState::Running).await;
        let [here, there] = [ground.stages[0].open().await, ground.stages[1].open().await];
        stage::until(&here, ground.server, |server| server.state == ServerState::Running).await;
        let was =
            std::fs::read(ground.disk(0, has(&here, ground.server).await.unwrap().volumes[0].volume_id));
        let spec = CreateSnapshot { memory: true, ..CreateSnapshot::default() };
        let asked = here.servers().snapshot(&Call::by_host(), ground.server, spec).await.unwrap().body;
        stage::succeeded(&here, asked.operation.id).await;
        let snapshot = asked.resource.unwrap().id;
        let spec = CreateClones { name: "twin".parse().unwrap(), count: 1, labels: Default::default() };
        let made = here.servers().clone_snapshot(&Call::by_host(), snapshot, spec).await.unwrap().body;
        stage::succeeded(&here, made.items[0].operation.as_ref().unwrap().id).await;
        let id = made.items[0].server_id;
        if is_off {
            let stop = ServerAction::Stop(StopServer { grace_s: 0 });
            let asked = here.servers().act(&Call::by_host(), id, stop).await.unwrap();
            stage::succeeded(&here, asked.body.operation.id).await;
        }
        let state = has(&here, id).await.unwrap().state;
        let volume = has(&here, id).await.unwrap().volumes[0].volume_id;
        let disk = std::fs::File::options().write(true).open(ground.disk(0, volume)).unwrap();
        disk.write_all_at(&[7; 4096], 64 << 10).unwrap();
        let mut wanted = was.unwrap();
        wanted[64 << 10..][..4096].fill(7);
        let address = listening(&there).await;
        let made = ticket(&there, None).await.unwrap().ticket;
        let moved =
            here.migrations().migrate(&Call::by_host(), id, super::spec(address, made)).await.unwrap();
        stage::succeeded(&here, moved.body.operation.id).await;
        let came = stage::until(&there, id, |server| server.state == state).await;
        let found = there.volumes().one(volume).await.unwrap();
        assert_ne!(found.filled_by, Some(FillMethod::Overlay));
        assert!(!came.allowed_actions.iter().any(|action| action == "settle-memory"));
        if is_off {
            assert!(std::fs::read(ground.disk(1, volume)).unwrap() == wanted, "its disk is another");
        }
        // Nothing of it is left where it was.
        let names = std::fs::read_dir(ground.stages[0].state_dir().join("volumes")).unwrap();
        assert_eq!(names.count(), 1, "that of the other server");
        for host in [here, there] {
            host.close().await;
        }
    }
}
