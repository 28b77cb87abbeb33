// SPDX-License-Identifier: GPL-2.0-only
/*
 * Freezing vhost-user devices; part of virtio_uml.c, at whose end it is
 * included.
 *
 * A frozen ring must say by itself where to go on. Our backends complete in
 * order, so everything below the used index is done and everything from it to
 * the available index is still to do - whether the backend was stopped in an
 * orderly way (GET_VRING_BASE: after its answer it writes no more), or
 * crashed. The next backend thus starts at the used index. Requests of a disk
 * are waited for, so that none is done twice; receive buffers never run out.
 *
 * Sockets are inherited descriptors, since a sandboxed guest cannot connect.
 */

#include <uapi/linux/virtio_ids.h>

#define DRAIN_POLL_MIN_US	20
#define DRAIN_POLL_MAX_US	500

static LIST_HEAD(vu_freeze_list);

/* The freeze depends on split rings and on kick and call descriptors. */
static void vu_freeze_limit_features(struct virtio_uml_device *vu_dev)
{
	if (!freeze_enabled())
		return;
	vu_dev->features &= ~BIT_ULL(VIRTIO_F_RING_PACKED);
}

static u64 vu_freeze_protocol_features(void)
{
	if (!freeze_enabled())
		return VHOST_USER_SUPPORTED_PROTOCOL_F;
	return VHOST_USER_SUPPORTED_PROTOCOL_F &
	       ~(BIT_ULL(VHOST_USER_PROTOCOL_F_SLAVE_REQ) |
		 BIT_ULL(VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS));
}

/* The inherited socket of the device, or a connection where nothing freezes. */
static int vu_freeze_connect(struct platform_device *pdev, const char *path)
{
	int fd;

	if (!freeze_enabled())
		return os_connect_socket(path);
	fd = os_freeze_device(pdev->id);
	if (fd < 0)
		dev_err(&pdev->dev, "no freeze_device= for %s\n", path);
	return fd;
}

/* A backend that does not answer must not stop the guest for ever. */
static int vu_freeze_wait_readable(int fd)
{
	return freeze_enabled() ? os_freeze_wait_readable(fd) : 0;
}

static void vu_freeze_add(struct virtio_uml_device *vu_dev)
{
	list_add_tail(&vu_dev->freeze_list, &vu_freeze_list);
}

static u16 vu_used_index(struct virtqueue *vq)
{
	return virtio16_to_cpu(vq->vdev, READ_ONCE(virtqueue_get_vring(vq)->used->idx));
}

static u16 vu_available_index(struct virtqueue *vq)
{
	return virtio16_to_cpu(vq->vdev, READ_ONCE(virtqueue_get_vring(vq)->avail->idx));
}

static bool vu_backend_gone(struct virtio_uml_device *vu_dev)
{
	if (!vu_dev->lost && os_freeze_peer_gone(vu_dev->sock))
		vu_dev->lost = true;
	return vu_dev->lost;
}

static int vu_drain_queue(struct virtio_uml_device *vu_dev, struct virtqueue *vq,
			  u64 deadline)
{
	int pause = DRAIN_POLL_MIN_US;

	if (vu_used_index(vq) == vu_available_index(vq))
		return 0;
	vu_notify(vq);
	while (vu_used_index(vq) != vu_available_index(vq)) {
		if (vu_backend_gone(vu_dev))
			return 0;
		if (os_freeze_clock() > deadline)
			return -ETIMEDOUT;
		os_freeze_sleep_us(pause);
		pause = min(pause + DRAIN_POLL_MIN_US, DRAIN_POLL_MAX_US);
	}
	return 0;
}

static int vu_drain(struct virtio_uml_device *vu_dev, u64 deadline)
{
	struct virtqueue *vq;
	int rc;

	if (vu_backend_gone(vu_dev) || vu_dev->vdev.id.device != VIRTIO_ID_BLOCK)
		return 0;
	virtio_device_for_each_vq((&vu_dev->vdev), vq) {
		rc = vu_drain_queue(vu_dev, vq, deadline);
		if (rc)
			return rc;
	}
	return 0;
}

static int vu_stop_queue(struct virtio_uml_device *vu_dev, u32 index)
{
	struct vhost_user_msg msg = {
		.header.request = VHOST_USER_GET_VRING_BASE,
		.header.size = sizeof(msg.payload.vring_state),
		.payload.vring_state.index = index,
	};
	int rc;

	rc = vhost_user_send(vu_dev, true, &msg, NULL, 0);
	if (rc)
		return rc;
	rc = vhost_user_recv_resp(vu_dev, &msg, sizeof(msg.payload.vring_state));
	if (rc)
		return rc;
	if (msg.header.request != VHOST_USER_GET_VRING_BASE ||
	    msg.payload.vring_state.index != index)
		return -EPROTO;
	return 0;
}

/*
 * A backend that is gone writes no more, too. One that is there and does not
 * answer might: what it says later could not be told from other answers, so
 * the connection is given up, and the device works again after a resume with
 * a new one.
 */
static int vu_stop(struct virtio_uml_device *vu_dev)
{
	struct virtqueue *vq;
	int rc;

	if (vu_dev->lost)
		return 0;
	vu_dev->stopped = true;
	virtio_device_for_each_vq((&vu_dev->vdev), vq) {
		rc = vu_stop_queue(vu_dev, vq->index);
		if (!rc)
			continue;
		if (vu_backend_gone(vu_dev))
			return 0;
		vu_dev->lost = true;
		os_shutdown_socket(vu_dev->sock, 1, 1);
		return rc;
	}
	return 0;
}

static int vu_freeze_failed(struct virtio_uml_device *vu_dev, int rc,
			    struct freeze_report *report, const char *why)
{
	scnprintf(report->text, sizeof(report->text), "device %d: %s",
		  vu_dev->pdev->id, why);
	return rc;
}

/* Interrupts are off: nobody submits. On failure the devices run again. */
int virtio_uml_freeze(struct freeze_report *report)
{
	u64 deadline = os_freeze_clock() +
		       freeze_options.timeout_ms * (u64)NSEC_PER_MSEC;
	struct virtio_uml_device *vu_dev;
	int rc;

	list_for_each_entry(vu_dev, &vu_freeze_list, freeze_list) {
		rc = vu_drain(vu_dev, deadline);
		if (rc)
			return vu_freeze_failed(vu_dev, rc, report,
				"the backend does not finish its requests");
	}
	list_for_each_entry(vu_dev, &vu_freeze_list, freeze_list) {
		rc = vu_stop(vu_dev);
		if (rc) {
			virtio_uml_thaw();
			virtio_uml_kick();
			return vu_freeze_failed(vu_dev, rc, report,
				"the backend does not stop");
		}
		if (vu_dev->lost)
			report->flags |= FREEZE_FLAG_BACKEND_LOST;
	}
	return 0;
}

/* A new call pipe under the old number: the backend closed its end. */
static int vu_renew_call(struct virtio_uml_device *vu_dev, struct virtqueue *vq)
{
	struct virtio_uml_vq_info *info = vq->priv;
	int rc, write_end;

	rc = os_freeze_pipe_at(info->call_fd, &write_end);
	if (rc)
		return rc;
	rc = vhost_user_set_vring_call(vu_dev, vq->index, write_end);
	os_close_file(write_end);
	return rc;
}

static int vu_start_queue(struct virtio_uml_device *vu_dev, struct virtqueue *vq)
{
	struct virtio_uml_vq_info *info = vq->priv;
	u32 index = vq->index;
	int rc;

	rc = vhost_user_set_vring_num(vu_dev, index, virtqueue_get_vring_size(vq));
	if (rc)
		return rc;
	rc = vhost_user_set_vring_base(vu_dev, index, vu_used_index(vq));
	if (rc)
		return rc;
	rc = vhost_user_set_vring_addr(vu_dev, index, virtqueue_get_desc_addr(vq),
				       virtqueue_get_used_addr(vq),
				       virtqueue_get_avail_addr(vq), (u64)-1);
	if (rc)
		return rc;
	rc = vu_renew_call(vu_dev, vq);
	if (rc)
		return rc;
	rc = vhost_user_set_vring_kick(vu_dev, index, info->kick_fd);
	if (rc)
		return rc;
	return vhost_user_set_vring_enable(vu_dev, index, true);
}

static int vu_start_queues(struct virtio_uml_device *vu_dev)
{
	struct virtqueue *vq;
	int rc;

	virtio_device_for_each_vq((&vu_dev->vdev), vq) {
		rc = vu_start_queue(vu_dev, vq);
		if (rc)
			return rc;
	}
	return 0;
}

static void vu_thaw(struct virtio_uml_device *vu_dev)
{
	struct virtqueue *vq;
	int rc;

	rc = vu_start_queues(vu_dev);
	if (rc) {
		vu_err(vu_dev, "the backend does not go on: %d\n", rc);
		vu_dev->lost = true;
		os_shutdown_socket(vu_dev->sock, 1, 1);
	}
	virtio_device_for_each_vq((&vu_dev->vdev), vq) {
		struct virtio_uml_vq_info *info = vq->priv;

		um_irq_rearm_fd(info->call_fd);
	}
}

/* Same process, same sockets: the queues that were stopped go on. */
void virtio_uml_thaw(void)
{
	struct virtio_uml_device *vu_dev;

	list_for_each_entry(vu_dev, &vu_freeze_list, freeze_list) {
		if (vu_dev->stopped && !vu_dev->lost)
			vu_thaw(vu_dev);
		vu_dev->stopped = false;
	}
}

static int vu_negotiate(struct virtio_uml_device *vu_dev)
{
	u64 protocol_features = vu_dev->protocol_features, offered;
	int rc;

	/* Until they are set again, no message asks for a reply. */
	vu_dev->protocol_features = 0;
	rc = vhost_user_set_owner(vu_dev);
	if (rc)
		return rc;
	rc = vhost_user_get_features(vu_dev, &offered);
	if (rc)
		return rc;
	if (vu_dev->features & ~offered)
		return -EOPNOTSUPP;
	if (offered & BIT_ULL(VHOST_USER_F_PROTOCOL_FEATURES)) {
		rc = vhost_user_get_protocol_features(vu_dev, &offered);
		if (rc)
			return rc;
		if (protocol_features & ~offered)
			return -EOPNOTSUPP;
		rc = vhost_user_set_protocol_features(vu_dev, protocol_features);
		if (rc)
			return rc;
		vu_dev->protocol_features = protocol_features;
	}
	return vhost_user_set_features(vu_dev, vu_dev->features);
}

static int vu_reconnect(struct virtio_uml_device *vu_dev)
{
	struct virtqueue *vq;
	int rc;

	rc = vu_freeze_connect(vu_dev->pdev, vu_dev->pdata->socket_path);
	if (rc < 0)
		return rc;
	vu_dev->sock = rc;
	vu_dev->lost = false;
	vu_dev->stopped = false;
	virtio_device_for_each_vq((&vu_dev->vdev), vq) {
		struct virtio_uml_vq_info *info = vq->priv;

		rc = os_freeze_move_fd(os_eventfd(0, 0), info->kick_fd);
		if (rc)
			return rc;
	}
	rc = vu_negotiate(vu_dev);
	if (rc)
		return rc;
	rc = vhost_user_set_mem_table(vu_dev);
	if (rc)
		return rc;
	return vu_start_queues(vu_dev);
}

/* In a fresh host process, before any other descriptor is made. */
int virtio_uml_reconnect(struct freeze_report *report)
{
	struct virtio_uml_device *vu_dev;
	int rc;

	list_for_each_entry(vu_dev, &vu_freeze_list, freeze_list) {
		rc = vu_reconnect(vu_dev);
		if (rc == -ENODEV)
			return vu_freeze_failed(vu_dev, rc, report,
				"no freeze_device= was given");
		if (rc == -EOPNOTSUPP)
			return vu_freeze_failed(vu_dev, rc, report,
				"the backend lacks a feature the guest uses");
		if (rc)
			return vu_freeze_failed(vu_dev, rc, report,
				"the backend does not take the device over");
	}
	return 0;
}

/* Pick up what was completed meanwhile, and let the backend look. */
void virtio_uml_kick(void)
{
	struct virtio_uml_device *vu_dev;
	struct virtqueue *vq;

	list_for_each_entry(vu_dev, &vu_freeze_list, freeze_list)
		virtio_device_for_each_vq((&vu_dev->vdev), vq) {
			vring_interrupt(0, vq);
			vu_notify(vq);
		}
}
